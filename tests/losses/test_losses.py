"""The losses against the oracle: values and every gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.losses import (
    LOSSES,
    SigmoidLoss,
    SigmoidLossConfig,
    SoftmaxLoss,
    SoftmaxLossConfig,
    all_pairs,
    reference,
)


def features(batch, dim, seed, num_captions):
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        torch.nn.functional.normalize(torch.randn(batch, dim, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    ids = torch.randint(0, num_captions, (batch,), generator=generator)
    text = text[ids % batch] if num_captions < batch else text  # equal captions have equal features
    return image, text, ids


def value_and_gradients(compute, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = compute(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def compare(name, duplicates, image, text, ids, scale, bias):
    kind = torch.promote_types(image.dtype, torch.float32)
    scalars = [torch.tensor(scale, dtype=kind)]
    if name == "sigmoid":
        scalars.append(torch.tensor(bias, dtype=kind))
    positive, counted = reference.pair_labels(ids, duplicates)
    oracle = getattr(reference, f"{name}_loss")
    expected = value_and_gradients(
        lambda *args: oracle(*args, positive, counted), image.double(), text.double(), *(s.double() for s in scalars)
    )
    loss = (SigmoidLoss if name == "sigmoid" else SoftmaxLoss)(duplicates)
    ours = value_and_gradients(lambda *args: loss(*args, caption_ids=ids), image, text, *scalars)
    return expected, ours


@given(
    batch=st.integers(1, 17),
    dim=st.integers(1, 9),
    seed=st.integers(0, 1000),
    num_captions=st.sampled_from([3, 10**9]),
    scale=st.floats(0.1, 100),
    bias=st.floats(-12, 2),
    name=st.sampled_from(["sigmoid", "softmax"]),
    duplicates=st.sampled_from(["negative", "ignore", "positive"]),
    tile=st.integers(1, 18),
)
@settings(max_examples=150, deadline=None)
def test_losses_equal_the_oracle(batch, dim, seed, num_captions, scale, bias, name, duplicates, tile):
    image, text, ids = features(batch, dim, seed, num_captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_pairs, "CPU_TILE", tile)
        expected, ours = compare(name, duplicates, image, text, ids, scale, bias)
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("tile", [4, 1000])
def test_several_texts_of_each_image(name, tile, monkeypatch):
    """Every pair of 7 images, two of which are one, with 21 texts, those of the same image matches."""
    monkeypatch.setattr(all_pairs, "CPU_TILE", tile)
    image, text = features(7, 5, 0, 10**9)[0], features(21, 5, 1, 10**9)[0]
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    positive = ids[:, None] == ids.repeat_interleave(3)
    scalars = [torch.tensor(8.0).double()] + [torch.tensor(-2.0).double()] * (name == "sigmoid")
    oracle, loss = getattr(reference, f"{name}_loss"), (SigmoidLoss if name == "sigmoid" else SoftmaxLoss)("positive")
    expected = value_and_gradients(
        lambda *args: oracle(*args, positive, torch.ones_like(positive)), image, text, *scalars
    )
    ours = value_and_gradients(lambda *args: loss(*args, caption_ids=ids), image, text, *scalars)
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="of one shape"):
        loss(image, text[:20], *scalars, caption_ids=ids)
    with pytest.raises(ValueError, match="of one shape"):
        type(loss)("negative")(image, text, *scalars)


def relative_errors(expected, ours):
    return [((a - b.double()).norm() / a.norm()).item() for a, b in zip(expected, ours, strict=True)]


def trained_features(batch, dim):
    """Texts that lie near their images, as after some training: loss and gradients are then well conditioned."""
    image, noise, ids = features(batch, dim, 0, 10**9)
    return image, torch.nn.functional.normalize(image + noise / 2, dim=1), ids


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("duplicates", ["negative", "ignore", "positive"])
@pytest.mark.parametrize(("batch", "dim"), [(33, 24), (1500, 96)])
def test_float32_is_within_a_millionth_of_the_oracle(name, duplicates, batch, dim):
    image, text, ids = trained_features(batch, dim)
    scale = 10.0 if name == "sigmoid" else 1 / 0.07
    ids = ids % (batch // 2)
    expected, ours = compare(name, duplicates, image.float(), text.float(), ids, scale, -10.0)
    assert max(relative_errors(expected, ours)) < 1e-6


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_float32_at_the_largest_scale(name):
    """An exponential is as exact relatively as its exponent is absolutely: 2^-24 of a logit of 100."""
    image, text, ids = features(300, 64, 0, 10**9)
    text = torch.nn.functional.normalize(text + image / 4, dim=1)
    expected, ours = compare(name, "negative", image.float(), text.float(), ids, 100.0, -10.0)
    assert max(relative_errors(expected, ours)) < 100 * 2**-24


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_bfloat16_features_are_as_exact_as_their_gradients_type(name):
    image, text, ids = trained_features(300, 64)
    expected, ours = compare(name, "negative", image.bfloat16(), text.bfloat16(), ids, 10.0, -10.0)
    errors = relative_errors(expected, ours)
    assert max(errors[0], *errors[3:]) < 1e-6, "loss and scalars are computed in float32"
    assert max(errors[1:3]) < 2**-8, "two roundings to bfloat16"


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_bfloat16_features_are_computed_in_float32(name):
    image, text, ids = features(16, 8, 0, 10**9)
    loss = LOSSES.get(name)().build()
    bias = None if name == "softmax" else torch.tensor(-3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(image.bfloat16(), text.bfloat16(), torch.tensor(10.0), bias)
    full = loss(image.bfloat16().float(), text.bfloat16().float(), torch.tensor(10.0), bias)
    assert half.dtype == torch.float32 and torch.equal(half, full)


def test_known_values():
    """Features that tell nothing apart: ln B for softmax; for sigmoid the log-odds bias gives the chance loss."""
    same = torch.nn.functional.normalize(torch.ones(8, 4), dim=1)
    assert SoftmaxLoss()(same, same, torch.tensor(10.0)).item() == pytest.approx(math.log(8))
    bias = torch.tensor(-math.log(7) - 10.0)  # the cosines are 1, so the logits are −log 7
    sigmoid = SigmoidLoss()(same, same, torch.tensor(10.0), bias).item()
    assert sigmoid == pytest.approx(SigmoidLossConfig().chance_loss(8), rel=1e-5)
    assert SoftmaxLossConfig().chance_loss(8) == pytest.approx(math.log(8))


def test_sigmoid_divides_by_the_batch_not_by_the_pairs():
    far = torch.eye(4)
    loss = SigmoidLoss()(far, far, torch.tensor(1.0), torch.tensor(0.0)).item()
    per_pair = [math.log(1 + math.exp(-1))] * 4 + [math.log(2)] * 12
    assert loss == pytest.approx(sum(per_pair) / 4)


def test_initial_logits():
    assert SigmoidLossConfig().initial_logits(512) == (10.0, pytest.approx(-6.236, abs=1e-3))
    assert SigmoidLossConfig().initial_logits(10**6) == (10.0, -10.0)
    assert SoftmaxLossConfig().initial_logits(512) == (pytest.approx(14.2857, abs=1e-4), None)
