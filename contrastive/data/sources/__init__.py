"""Sources of samples, each named by one string; see `open_source`."""

from typing import Any

__all__ = ["SOURCES", "announce", "open_source"]


def __getattr__(name: str) -> Any:
    """Import `open` when one of its names is first asked for: a single source is imported without the others."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from contrastive.data.sources import open as opening

    return getattr(opening, name)
