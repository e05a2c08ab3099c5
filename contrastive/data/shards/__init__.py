"""WebDataset shards, from the tar files to samples and back.

To open some: `indexing` finds the index of each, or makes it (`shard_index` is its files, `tar_members` the walk over a
tar's headers); of shards that lie far away `remote` keeps local copies. To read them: `shard_source`. To write them:
`shard_writing`. `parallel` spreads either work over processes.
"""
