"""Float32 matrix products on a CPU, where oneDNN is faster than MKL, which torch takes."""

import os
from pathlib import Path

import torch


def _prefers_onednn() -> bool:
    """Whether oneDNN's float32 products are faster than MKL's: on AMD's processors.

    MKL runs AVX2 code there at the most; oneDNN uses what the processor has, AVX-512 at twice the rate.
    """
    described = Path("/proc/cpuinfo")
    if described.exists():
        with described.open() as file:
            maker = file.read(1024)  # the first processor says it; all of them take long on a large machine
    else:
        maker = os.environ.get("PROCESSOR_IDENTIFIER", "")
    return "AuthenticAMD" in maker and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


ONEDNN = _prefers_onednn()


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_left_whole = torch.library.custom_op("contrastive::product", _by_onednn, mutates_args=())


@_left_whole.register_fake
def _(x, weight, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x · weightᵀ + bias by oneDNN: (..., D) and (E, D) to (..., E), float32 on a CPU. It has no gradient."""
    return (_left_whole if torch.compiler.is_compiling() else _by_onednn)(x, weight, bias)
