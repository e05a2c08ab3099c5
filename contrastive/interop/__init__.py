"""Models in and out of folders: our own format and other libraries'."""

from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.export import export
from contrastive.interop.loading import load
from contrastive.interop.native import save_model

__all__ = ["Absent", "Bundle", "export", "load", "save_model"]
