"""A name for the weights themselves: a folder can hold other ones tomorrow."""

import hashlib

import torch
from torch import nn


def weights_key(model: nn.Module) -> str:
    """Return the sha256, in hex, of all parameters and buffers: name, dtype, shape and bytes of each.

    The same weights have the same key on every device and in every folder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
