"""What an order puts into a batch."""

import numpy as np


def batch_indices(order, step):
    """Return the source indices of the global batch of `step`, int64 (global_batch_size,)."""
    first = step * order.global_batch_size
    return order.at(np.arange(first, first + order.global_batch_size))
