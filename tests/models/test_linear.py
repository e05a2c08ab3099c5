"""Linear by oneDNN's products: what nn.Linear gives, forward and backward."""

import pytest
import torch
from torch import nn

from contrastive import products
from contrastive.models.transformer import Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)


def results(layer: nn.Linear, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(upstream)
    found = [out.detach(), x.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 1, 24)])
def test_equals_the_plain_layer_with_its_gradients(shape, bias, monkeypatch):
    torch.manual_seed(0)
    layer, x, upstream = Linear(24, 40, bias=bias), torch.randn(shape), torch.randn(*shape[:-1], 40)
    found = results(layer, x, upstream)
    monkeypatch.setattr(products, "ONEDNN", False)
    torch.testing.assert_close(found, results(layer, x, upstream), rtol=1e-5, atol=1e-5, check_stride=True)


def test_takes_strided_and_expanded_rows_and_gradients(monkeypatch):
    torch.manual_seed(0)
    layer, upstream = Linear(24, 40), torch.randn(40, 3, 4).permute(2, 1, 0)
    inputs = [torch.randn(1, 1, 24).expand(4, 3, 24), torch.randn(24, 3, 4).permute(2, 1, 0)]
    found = [results(layer, x, upstream) for x in inputs]
    monkeypatch.setattr(products, "ONEDNN", False)
    torch.testing.assert_close(found, [results(layer, x, upstream) for x in inputs], rtol=1e-5, atol=1e-5)


def test_computes_no_gradient_that_nobody_asked_for():
    layer, x = Linear(8, 8).requires_grad_(False), torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    assert not layer(x.detach()).requires_grad


def test_an_empty_batch_gives_an_empty_output():
    assert Linear(8, 4)(torch.randn(0, 3, 8)).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_autocast_are_left_to_torch(dtype):
    assert Linear(8, 4).to(dtype)(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(8, 4)(torch.randn(2, 8)).dtype == torch.bfloat16


def test_the_compiler_leaves_the_product_whole():
    torch.manual_seed(0)
    layer, x = Linear(8, 4), torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
