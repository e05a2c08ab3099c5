"""How the losses behave inside autograd: locked towers, repeated use, mixed precision, compiled models."""

import pytest
import torch
from torch import nn

from contrastive.losses import SigmoidLoss, SoftmaxLoss, all_pairs, reference

NAMES = ["sigmoid", "softmax"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(all_pairs, "CPU_TILE", 5)  # so that small batches have whole, cut and off-diagonal tiles


def leaves(name, batch=13, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(batch, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for _ in range(2)
    )
    scalars = [torch.tensor(5.0, dtype=torch.float64)]
    if name == "sigmoid":
        scalars.append(torch.tensor(-2.0, dtype=torch.float64))
    return [tensor.requires_grad_() for tensor in (image, text, *scalars)]


def loss_of(name):
    return SigmoidLoss() if name == "sigmoid" else SoftmaxLoss()


def oracle(name, image, text, *scalars):
    own = torch.eye(len(image), dtype=torch.bool)
    return getattr(reference, f"{name}_loss")(image, text, *scalars, own, torch.ones_like(own))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1}])
def test_only_the_gradients_that_are_wanted(name, wanted):
    """A locked tower, or a fixed scale."""
    tensors = leaves(name)
    if name == "sigmoid" and 2 in wanted:
        wanted = wanted | {3}
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    inputs = [tensors[i] for i in sorted(wanted)]
    ours = torch.autograd.grad(loss_of(name)(*tensors), inputs)
    expected = torch.autograd.grad(oracle(name, *tensors), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_there_is_one_product_per_tile(name):
    tensors = [tensor.detach() for tensor in leaves(name)]
    with CountProducts() as count:
        value = loss_of(name)(*tensors)
    assert not value.requires_grad and count.products == 9
    torch.testing.assert_close(value, oracle(name, *tensors))


@pytest.mark.parametrize(("name", "expected"), [("sigmoid", 3), ("softmax", 4)])
def test_number_of_matrix_products(name, expected):
    """Three for the sigmoid and four for the softmax loss, all in the forward pass, for each of the 9 tiles."""
    tensors = leaves(name)
    with CountProducts() as count:
        value = loss_of(name)(*tensors)
    assert count.products == 9 * expected
    with CountProducts() as count:
        value.backward()
    assert count.products == 0


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul")
        self.largest = max(self.largest, *(t.numel() for t in (out, *args) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
def test_no_tensor_is_larger_than_a_tile_or_the_features(name, duplicates):
    tensors = leaves(name, batch=64, dim=3)
    ids = torch.arange(64) // 2
    with CountProducts() as count:
        (SigmoidLoss if name == "sigmoid" else SoftmaxLoss)(duplicates)(*tensors, caption_ids=ids).backward()
    assert count.largest == 64 * 3


@pytest.mark.parametrize("name", NAMES)
def test_used_twice_in_one_graph(name):
    tensors = leaves(name)
    first, second = loss_of(name)(*tensors), loss_of(name)(*tensors)
    ours = torch.autograd.grad(first * 2 + second * first, tensors)
    first, second = oracle(name, *tensors), oracle(name, *tensors)
    torch.testing.assert_close(ours, torch.autograd.grad(first * 2 + second * first, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_through_a_kept_graph(name):
    tensors = leaves(name)
    value = loss_of(name)(*tensors)
    once = torch.autograd.grad(value, tensors, retain_graph=True, grad_outputs=torch.tensor(3.0).double())
    again = torch.autograd.grad(value, tensors)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, 3 * b)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_under_a_gradient_scaler(name, dtype):
    """Scaled by 2^16, gradients of the features survive their own type; so they must not be rounded before."""
    tensors = [t.detach().requires_grad_() for t in (*leaves(name, dtype=dtype)[:2], *leaves(name)[2:])]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_of(name)(*tensors)
    assert value.dtype == torch.float32
    scaler.scale(value * 1e-5).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    (oracle(name, *exact) * (1e-5 * 2.0**16)).backward()
    unit = torch.finfo(dtype).eps
    for ours, expected in zip(tensors, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=2 * unit, atol=1e-6 * unit)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        return self.image(x), self.text(x), self.scale.exp(), self.bias


@pytest.mark.parametrize("whole_step", [False, True])
def test_under_torch_compile(whole_step):
    torch.manual_seed(0)
    model, x, loss = Model(), torch.randn(13, 6), SigmoidLoss()
    value = loss(*model(x))
    expected = torch.autograd.grad(value, list(model.parameters()))
    # aot_eager traces forward and backward as the default does, without needing a C++ compiler
    if whole_step:
        compiled = torch.compile(lambda x: loss(*model(x)), backend="aot_eager")(x)
    else:
        compiled = loss(*torch.compile(model, backend="aot_eager")(x))
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, list(model.parameters())), expected)


@pytest.mark.parametrize("name", NAMES)
def test_features_whose_numbers_do_not_lie_side_by_side(name):
    tensors = leaves(name)
    turned = [tensor.detach().t().contiguous().t().requires_grad_() for tensor in tensors[:2]]
    assert not turned[0].is_contiguous()
    ours = torch.autograd.grad(loss_of(name)(*turned, *tensors[2:]), turned)
    torch.testing.assert_close(ours, torch.autograd.grad(oracle(name, *tensors), tensors[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_computed_under_no_grad(name):
    tensors = leaves(name)
    with torch.no_grad(), CountProducts() as count:
        loss_of(name)(*tensors)
    assert count.products == 9


def test_softmax_of_logits_far_apart_is_finite():
    x = torch.eye(4).requires_grad_()
    value = SoftmaxLoss()(x, -x, torch.tensor(800.0))
    torch.testing.assert_close(value, torch.tensor(800.0) + torch.tensor(3.0).log())
