"""Affinity distillation: a student's image-text distributions drawn towards its teachers' (MobileCLIP, TinyCLIP)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from contrastive.distributed.collectives import all_gather_even
from contrastive.losses.all_pairs import LN_2, LOG2_E, AllPairs, Tile, swept, uncompiled
from contrastive.losses.softmax import log_sum_exps


class TeacherFeatures(NamedTuple):
    """What a teacher makes of this rank's pairs, without gradient; its width F may be another than the student's."""

    image: torch.Tensor
    """(B/W, F), unit length."""
    text: torch.Tensor
    """(B/W, F), row i describing image i."""
    logit_scale: torch.Tensor | float
    """The factor on its similarities, exponentiated: 1 / its temperature."""


class AffinityLoss(nn.Module):
    """Mean over teachers of KL(teacher ‖ student) between the softmaxes of their similarity matrices, both ways.

    The distillation loss of MobileCLIP (Vasu et al. 2024, L_distill) and the affinity mimicking of TinyCLIP (Wu et al.
    2023): each image's distribution over the texts of the global batch, each text's over the images, half and half.
    A student of the sigmoid loss is no exception: its logit bias would cancel in either softmax, so none is taken.
    """

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        teachers: Sequence[TeacherFeatures],
    ) -> torch.Tensor:
        """Return this rank's share of the loss, a scalar, in float32 at least; averaged over ranks it is the loss.

        Memory is linear in the batch: a sweep over tiles for the normalisers of the student and of each teacher, and
        one over all of them for loss and gradients.

        Args:
            image_features: (B/W, E), unit length. text_features: likewise, row i describing image i.
            logit_scale: the student's factor on the similarities (already exponentiated).
            teachers: at least one; as many on every rank.

        Raises:
            NonFiniteFeatures, ValueError: as `PairLoss.forward`, for the teachers' features too.
        """
        return uncompiled(swept)(partial(_sums, teachers=teachers), image_features, text_features, logit_scale)


def _sums(pairs: AllPairs, teachers: Sequence[TeacherFeatures]) -> tuple[torch.Tensor]:
    exact = pairs.scale.dtype
    student = [lse.to(exact) for lse in log_sum_exps(pairs)]
    taught = []
    for teacher in teachers:
        own = AllPairs(*teacher)
        if len(own.image) != len(pairs.image):
            raise ValueError(f"a teacher has {len(own.image)} rows, the student {len(pairs.image)}")
        # Its texts are gathered once: beside the student's, which may come in a ring, each block would be sent too.
        taught.append((own, all_gather_even(own.text), [lse.to(exact) for lse in log_sum_exps(own)]))
    loss_sum = torch.zeros((), dtype=torch.float64, device=pairs.image.device)
    for tile in pairs.tiles(None, gradients=True):
        of_tile = [
            (own.image[tile.rows].to(exact), text[tile.columns].to(exact), own.scale, *_sides(lse, tile))
            for own, text, lse in taught
        ]
        loss, logit_gradient = affinity_tile(tile, pairs.scale, *_sides(student, tile), of_tile)
        loss_sum += loss
        if any(pairs.wants):
            tile.add_gradient(logit_gradient)
    return (loss_sum,)


def _sides(lse: Sequence[torch.Tensor], tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-sum-exps of a tile's rows (r, 1) and columns (c,), of those of own rows and all columns."""
    return lse[0][tile.rows, None], lse[1][tile.columns]


def affinity_tile(tile: Tile, scale: torch.Tensor, row_lse: torch.Tensor, column_lse: torch.Tensor, teachers):
    """Return (Σ ½ mean over teachers of p · log p/q, row- and column-wise, 0-dim float64; ½ (Q − mean P) (r, c)).

    P and Q are the teacher's and the student's softmaxes, of rows and of columns. The second is B times the gradient by
    the student's logits scale · x·yᵀ, and valid until the next tile.

    Args:
        row_lse, column_lse: (r, 1), (c,), the student's log-sum-exps over the whole batch, to the base 2.
        teachers: (x (r, F), y (c, F), scale, row_lse, column_lse) of each.
    """
    z, gradient, t, p, work = tile.matrices(5)
    torch.mm(tile.x * (scale * LOG2_E), tile.y.T, out=z)
    # The half goes into the exponent: 2^(z − 1) = ½ 2^z.
    torch.sub(z, row_lse + 1, out=gradient).exp2_()
    gradient += torch.sub(z, column_lse + 1, out=work).exp2_()
    loss = torch.zeros((), dtype=torch.float64, device=z.device)
    for x, y, teacher_scale, *teacher_lse in teachers:
        torch.mm(x * (teacher_scale * LOG2_E), y.T, out=t)
        for lse, own_lse in zip(teacher_lse, (row_lse, column_lse), strict=True):
            torch.sub(t, lse + 1, out=p).exp2_()
            gradient.sub_(p, alpha=1 / len(teachers))
            torch.sub(t, z, out=work).sub_(lse - own_lse)  # log₂ p/q
            loss += work.mul_(p).sum(1).sum(dtype=torch.float64)
    return loss * (LN_2 / len(teachers)), gradient
