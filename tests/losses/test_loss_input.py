"""What a loss refuses on one process; test_ranks.py has what ranks say to each other."""

import pytest
import torch

from contrastive.losses import NonFiniteFeatures, SigmoidLoss, SoftmaxLoss

LOSSES = [SigmoidLoss(), SoftmaxLoss()]


def call(loss, image, text, scale=None):
    bias = (torch.tensor(0.0),) if isinstance(loss, SigmoidLoss) else ()
    return loss(image, text, torch.tensor(1.0) if scale is None else scale, *bias)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 4), r"\(2, 4\), text_features \(3, 4\)"),
        (torch.ones(2, 4), torch.ones(2, 5), r"of one shape, got .*\(2, 5\)"),
        (torch.ones(0, 4), torch.ones(0, 4), r"non-empty .*\(0, 4\)"),
        (torch.ones(4), torch.ones(4), r"matrices .*\(4,\)"),
        (torch.ones(2, 4).long(), torch.ones(2, 4).long(), "floating point, got torch.int64"),
        (torch.ones(2, 4), torch.ones(2, 4).int(), "floating point, got torch.float32 and torch.int32"),
        (torch.ones(2, 4), torch.ones(2, 4, device="meta"), "text_features is on meta, image_features on cpu"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_do_not_fit(loss, image, text, message):
    with pytest.raises(ValueError, match=message):
        call(loss, image, text)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(loss, value):
    fine, broken = torch.eye(3), torch.eye(3)
    broken[1, 2] = broken[0, 1] = value
    with pytest.raises(NonFiniteFeatures, match=r"image_features on rank 0 has 2 of 9 values that are NaN"):
        call(loss, broken, fine)
    with pytest.raises(NonFiniteFeatures, match="text_features on rank 0"):
        call(loss, fine, broken)
    with pytest.raises(NonFiniteFeatures, match="logit_scale on rank 0"):
        call(loss, fine, fine, torch.tensor(value))


@pytest.mark.parametrize("loss", LOSSES)
def test_scale_that_does_not_fit(loss):
    with pytest.raises(ValueError, match="logit_scale is on meta, image_features on cpu"):
        call(loss, torch.eye(2), torch.eye(2), torch.tensor(1.0, device="meta"))
    with pytest.raises(ValueError, match=r"logit_scale must be one number, got shape \(2,\)"):
        call(loss, torch.eye(2), torch.eye(2), torch.ones(2))


def test_missing_bias_and_unwanted_bias():
    x, scale = torch.eye(2), torch.tensor(1.0)
    with pytest.raises(ValueError, match="needs a logit_bias"):
        SigmoidLoss()(x, x, scale, None)
    with pytest.raises(ValueError, match="takes no logit_bias"):
        SoftmaxLoss()(x, x, scale, torch.tensor(0.0))


@pytest.mark.parametrize("loss", [SigmoidLoss("ignore"), SoftmaxLoss("positive")])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs caption_ids"),
        (torch.arange(3), r"int64 \(2,\) on cpu, got torch.int64 \(3,\)"),
        (torch.zeros(2), "int64 .* got torch.float32"),
    ],
)
def test_caption_ids_that_do_not_fit(loss, ids, message):
    x = torch.eye(2)
    bias = torch.tensor(0.0) if isinstance(loss, SigmoidLoss) else None
    with pytest.raises(ValueError, match=message):
        loss(x, x, torch.tensor(1.0), bias, caption_ids=ids)


def test_unknown_treatment_of_duplicates():
    for kind in (SigmoidLoss, SoftmaxLoss):
        with pytest.raises(ValueError, match="duplicates='positives': choose negative, ignore or positive"):
            kind("positives")
