"""Float32 matrix products on a CPU, where oneDNN is faster than MKL, which torch takes."""

import os
from pathlib import Path

import torch


def _prefers_onednn() -> bool:
    """Whether oneDNN's float32 products are faster than MKL's: on processors not of Intel's make.

    MKL runs AVX2 code there at the most; oneDNN uses what the processor has, AVX-512 at twice the rate.
    """
    described = Path("/proc/cpuinfo")
    maker = described.read_text() if described.exists() else os.environ.get("PROCESSOR_IDENTIFIER", "")
    return "AuthenticAMD" in maker and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


ONEDNN = _prefers_onednn()


@torch.library.custom_op("contrastive::product", mutates_args=())  # as such it is left whole by torch.compile
def _opaque_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(x, weight, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x · weightᵀ + bias by oneDNN: (..., D) and (E, D) to (..., E), float32 on a CPU. It has no gradient."""
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
