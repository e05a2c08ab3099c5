"""Model folders of transformers."""
