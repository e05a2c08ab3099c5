"""Model folders of open_clip."""
