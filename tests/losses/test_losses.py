"""The losses against the oracle: values and every gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.losses import LOSSES, SigmoidLoss, SigmoidLossConfig, SoftmaxLoss, SoftmaxLossConfig, reference


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
    scalars = [torch.tensor(scale, dtype=image.dtype)]
    if name == "sigmoid":
        scalars.append(torch.tensor(bias, dtype=image.dtype))
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
)
@settings(max_examples=80, deadline=None)
def test_losses_equal_the_oracle(batch, dim, seed, num_captions, scale, bias, name, duplicates):
    image, text, ids = features(batch, dim, seed, num_captions)
    expected, ours = compare(name, duplicates, image, text, ids, scale, bias)
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_float32_is_close_to_the_oracle(name):
    image, text, ids = features(33, 24, 0, 10**9)
    for a, b in zip(*compare(name, "negative", image.float(), text.float(), ids, 10.0, -3.5), strict=True):
        torch.testing.assert_close(a, b.double(), rtol=2e-5, atol=1e-6)  # float32 sums of 33 x 33 terms


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
    assert SigmoidLossConfig(init_bias=-3.0).initial_logits(512)[1] == -3.0
    assert SoftmaxLossConfig().initial_logits(512) == (pytest.approx(14.2857, abs=1e-4), None)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 4), r"\(2, 4\), text_features \(3, 4\)"),
        (torch.ones(2, 4), torch.ones(2, 5), "of one shape"),
        (torch.ones(0, 4), torch.ones(0, 4), "non-empty"),
        (torch.ones(2, 4).long(), torch.ones(2, 4).long(), "floating point"),
    ],
)
@pytest.mark.parametrize("loss", [SigmoidLoss(), SoftmaxLoss()])
def test_bad_features(loss, image, text, message):
    bias = torch.tensor(0.0) if isinstance(loss, SigmoidLoss) else None
    with pytest.raises(ValueError, match=message):
        loss(image, text, torch.tensor(1.0), bias)


def test_missing_bias_ids_and_unwanted_bias():
    x, scale = torch.eye(2), torch.tensor(1.0)
    with pytest.raises(ValueError, match="needs a logit_bias"):
        SigmoidLoss()(x, x, scale, None)
    with pytest.raises(ValueError, match="takes no logit_bias"):
        SoftmaxLoss()(x, x, scale, torch.tensor(0.0))
    for loss, bias in ((SigmoidLoss("ignore"), torch.tensor(0.0)), (SoftmaxLoss("positive"), None)):
        with pytest.raises(ValueError, match="needs caption_ids"):
            loss(x, x, scale, bias)
