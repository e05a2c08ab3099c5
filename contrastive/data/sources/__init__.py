"""Sources of samples, each named by one string; see `open_source`."""

from contrastive.data.sources.open import SOURCES, open_source

__all__ = ["SOURCES", "open_source"]
