"""Sources of samples, each named by one string; see `open_source`."""

from typing import Any

__all__ = ["SOURCES", "open_source"]


def __getattr__(name: str) -> Any:
    # When first asked for: what only one source needs (paths, class names) would bring all of them otherwise.
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from contrastive.data.sources import open

    return getattr(open, name)
