"""Models in and out of folders: our own format."""

from contrastive.interop.native import Bundle, load, save_model

__all__ = ["Bundle", "load", "save_model"]
