"""Model folders of timm."""
