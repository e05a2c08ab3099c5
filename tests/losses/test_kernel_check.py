"""A Triton kernel that fails, or lies, is found out before a loss uses it; the loss is then plain torch's.

No kernel runs here: others stand in for them. triton_cases.py has the check of the real ones.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from contrastive.losses import SigmoidLoss, SoftmaxLoss, all_pairs, kernel_check, sigmoid, softmax

triton_tiles = pytest.importorskip("contrastive.losses.triton_tiles")


class PlainTiles:
    """Stands in for TritonTiles: right by default. `made` are the sizes asked for, `called` counts tiles."""

    made: list
    called = 0

    def __init__(self, like, rows, columns):
        type(self).made.append((rows, columns))

    def answer(self, function, tile, *arguments):
        type(self).called += 1
        return function(replace(tile, kernels=None, buffers=[]), *arguments)

    def sigmoid_tile(self, tile, *arguments):
        return self.answer(sigmoid.sigmoid_tile, tile, *arguments)

    def statistics_tile(self, tile, *arguments):
        return self.answer(softmax.statistics_tile, tile, *arguments)

    def gradient_tile(self, tile, *arguments):
        return self.answer(softmax.gradient_tile, tile, *arguments)


class RaisingTiles(PlainTiles):
    def answer(self, function, tile, *arguments):
        super().answer(function, tile, *arguments)
        raise RuntimeError("ptxas of another age\nand much more")


class LyingTiles(PlainTiles):
    """One entry of one result is wrong."""

    def answer(self, function, tile, *arguments):
        found = super().answer(function, tile, *arguments)
        wrong = found if torch.is_tensor(found) else next(f for f in found[::-1] if f is not None)
        wrong.view(-1)[-1] += 0.2 + 0.1 * wrong.view(-1)[-1].abs()
        return found


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(kernel_check, "_found", {})
    monkeypatch.setattr(all_pairs, "_takes_kernels", lambda features: True)
    monkeypatch.setattr(all_pairs, "GPU_TILE", 32)
    monkeypatch.setattr(all_pairs, "PLAIN_GPU_TILE", 16)


def use(monkeypatch, tiles):
    tiles.made, tiles.called = [], 0
    monkeypatch.setattr(triton_tiles, "TritonTiles", tiles)


def loss_and_gradients(name, duplicates="negative", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(40, 12, generator=generator)).to(dtype).requires_grad_() for _ in range(2)
    )
    scalars = [torch.tensor(value, requires_grad=True) for value in ((10.0, -4.0) if name == "sigmoid" else (14.0,))]
    loss = (SigmoidLoss if name == "sigmoid" else SoftmaxLoss)(duplicates)
    value = loss(image, text, *scalars, caption_ids=torch.arange(40) % 31)
    return [value.detach(), *torch.autograd.grad(value, [image, text, *scalars])]


def plain(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(all_pairs, "_takes_kernels", lambda features: False)
        return loss_and_gradients(*args)


@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_kernels_that_work_are_used_and_checked_once(name, duplicates, monkeypatch, capsys):
    use(monkeypatch, PlainTiles)
    expected = plain(monkeypatch, name, duplicates)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(name, duplicates), expected)
    trials = [size for size in PlainTiles.made if size == (kernel_check.ROWS, kernel_check.COLUMNS)]
    kernels = {"sigmoid": ["sigmoid_tile"], "softmax": ["statistics_tile", "gradient_tile"]}[name]
    assert len(trials) == sum(len(triton_tiles.configurations(kernel, torch.zeros(1))) for kernel in kernels)
    assert PlainTiles.called == len(trials) + 2 * len(kernels) * 4  # two losses of 2 x 2 tiles a sweep
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("tiles", [RaisingTiles, LyingTiles])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_kernels_that_do_not_work_are_told_once_and_never_used(name, tiles, duplicates, monkeypatch, capsys):
    use(monkeypatch, tiles)
    expected = plain(monkeypatch, name, duplicates)
    torch.testing.assert_close(loss_and_gradients(name, duplicates), expected)
    told = capsys.readouterr().err
    assert told.startswith("warning: a Triton kernel of the loss does not work here (") and told.count("\n") == 1
    assert ("ptxas of another age" if tiles is RaisingTiles else "gives wrong numbers") in told
    assert tiles.called == 1
    for other in ("sigmoid", "softmax"):  # for the process, whichever kernel it was
        torch.testing.assert_close(loss_and_gradients(other), plain(monkeypatch, other))
    assert tiles.called == 1 and capsys.readouterr().err == ""


def test_bfloat16_features_lose_nothing_where_kernels_do_not_work(monkeypatch):
    use(monkeypatch, RaisingTiles)
    monkeypatch.setattr(all_pairs, "_product_type", lambda image, text: torch.bfloat16)  # as on a GPU
    for name in ("sigmoid", "softmax"):
        found = loss_and_gradients(name, "negative", torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(all_pairs, "_product_type", lambda image, text: torch.float32)  # a CPU's
            torch.testing.assert_close(found, plain(monkeypatch, name, "negative", torch.bfloat16))


def test_a_configuration_too_large_for_the_gpu_is_passed_over(monkeypatch, capsys):
    class SmallGpu(PlainTiles):
        def answer(self, function, tile, *arguments):
            if type(self).called == 0:
                type(self).called += 1
                raise triton_tiles.OutOfResources(200_000, 100_000, "shared memory")
            return super().answer(function, tile, *arguments)

    use(monkeypatch, SmallGpu)
    loss_and_gradients("sigmoid")
    assert SmallGpu.called > 4 and capsys.readouterr().err == ""


def test_no_memory_is_not_the_kernels_fault(monkeypatch):
    class Full(PlainTiles):
        def answer(self, function, tile, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

    use(monkeypatch, Full)
    with pytest.raises(torch.OutOfMemoryError):
        loss_and_gradients("sigmoid")
