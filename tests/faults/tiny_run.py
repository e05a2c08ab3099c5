"""The run that the faults happen to: 9 steps of a few milliseconds, a checkpoint every 3."""

TINY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "digits:train", vocab_size: 300}
train: {steps: 9, global_batch_size: 16, log_every: 1}
checkpoint: {every: 3, keep: 10}
"""
