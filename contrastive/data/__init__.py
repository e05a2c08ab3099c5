"""Data: where samples come from, in what order, and how they become tensors."""
