"""The processes of a run: what they exchange, what they run on, and the tie between one and its parent."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux; elsewhere nothing happens).

    The parent is the thread that started this process: it has to live as long as the process should.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def keep_freed_memory() -> None:
    """Have malloc keep what tensors free, up to 2 GiB, for those of the next step (glibc; elsewhere nothing happens).

    Given back to the kernel it returns as zeros, a page fault at a time: a sixth of a small model's step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
