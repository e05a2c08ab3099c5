"""Models in and out of folders: our own format."""

from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.loading import load
from contrastive.interop.native import save_model

__all__ = ["Absent", "Bundle", "load", "save_model"]
