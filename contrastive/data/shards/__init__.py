"""WebDataset shards: indexing, reading from here and from afar, writing."""
