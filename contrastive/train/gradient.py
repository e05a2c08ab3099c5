"""The gradient of a step of pretraining: one loss over the global batch, in micro-batches where asked.

A contrastive loss is not a sum over micro-batches: all are embedded first without a graph, the loss of the whole batch
gives each feature its gradient, and each micro-batch is embedded again, with the same random numbers, to carry it into
the towers (Gao et al. 2021, "GradCache"). Loss and gradient are the same, with the activations of one at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from contrastive.distributed.runtime import Runtime
from contrastive.models import Features, PackedTokens
from contrastive.objectives.learner import ByObjective, Embedded
from contrastive.objectives.objective import Objective, Tensors
from contrastive.patches import Patches
from contrastive.train.task import seed_step

CONTRASTIVE = "contrastive"


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step, b samples with K captions each, cut into n micro-batches of b' = b / n."""

    pixels: torch.Tensor | Patches
    """(b, 3, H, W), normalised, or native images."""
    texts: Sequence[torch.Tensor | PackedTokens]
    """Of each micro-batch: ids (b'·K, L), or packed."""
    caption_ids: torch.Tensor
    """(b,), or (b, K); for `all_captions` what tells the images apart, K times each."""
    inputs: Mapping[str, Tensors] | None = None
    """Of each objective that takes part in the step, rows of b samples; None where the model has none."""

    def parts(self) -> list[tuple]:
        """Return what each micro-batch gives the model: pixels and texts; where there are objectives, their inputs."""
        n = len(self.texts)
        parts = list(zip(self.pixels.chunk(n), self.texts, strict=True))
        if self.inputs is None:
            return parts
        return [(*part, inputs) for part, inputs in zip(parts, in_parts(self.inputs, n), strict=True)]


def in_parts(tensors: Mapping[str, Tensors], n: int) -> list[ByObjective]:
    """Return the rows of each of n micro-batches, by objective and name, of those of all."""
    chunks = {name: {key: value.chunk(n) for key, value in own.items()} for name, own in tensors.items()}
    return [
        {name: {key: value[part] for key, value in own.items()} for name, own in chunks.items()} for part in range(n)
    ]


def joined(parts: Sequence[ByObjective]) -> ByObjective:
    """Undo `in_parts`."""
    return {
        name: {key: torch.cat([part[name][key] for part in parts]) for key in own} for name, own in parts[0].items()
    }


def forward_backward(
    model: nn.Module,
    loss: nn.Module | None,
    batch: Batch,
    *,
    between: float = 0.0,
    all_captions: bool = False,
    objectives: Mapping[str, Objective] | None = None,
    seed: tuple[int, int],
    runtime: Runtime,
) -> dict[str, torch.Tensor]:
    """Add the gradient of the loss over the global batch; return this rank's losses, detached scalars by name.

    'loss' is what is descended; where there are objectives, those that it is made of follow, not weighted.

    Args:
        model: the wrapped dual encoder, or `Learning`. loss: None where objectives are all that is learnt.
        between, all_captions: see `loss_of_captions`.
        objectives: of a `Learning`, those that take part, as in `batch.inputs`. seed: (run seed, step), for dropout.
    """
    captions = {"between": between, "all_captions": all_captions}
    step = _Step(model, loss, batch, captions, objectives, seed, runtime)
    return step.at_once() if len(batch.texts) == 1 else step.in_micro_batches()


class _Step:
    """See `forward_backward`."""

    def __init__(self, model, loss, batch: Batch, captions, objectives, seed, runtime):
        self.model, self.loss, self.parts, self.caption_ids = model, loss, batch.parts(), batch.caption_ids
        self.captions, self.seed, self.runtime = captions, seed, runtime
        self.plain, self.objectives = objectives is None, objectives or {}
        self.targets = self._targets()
        self.targets_of_parts = in_parts(self.targets, len(self.parts))

    def at_once(self) -> dict[str, torch.Tensor]:
        outputs = self._embed(0)
        losses = _added(self._of_batch(outputs.features, outputs.more), outputs.losses)
        total = self._weighted(losses)
        (total if outputs.idle is None else total + outputs.idle).backward()
        return self._told(total, losses)

    def in_micro_batches(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            cached = [self._embed(part) for part in range(len(self.parts))]
        logits = (
            scalar if scalar is None else scalar.detach().clone().requires_grad_() for scalar in cached[0].features[2:]
        )
        embedded = (
            None if one is None else torch.cat([part.features[i] for part in cached]).requires_grad_()
            for i, one in enumerate(cached[0].features[:2])
        )
        features = Features(*embedded, *logits)
        more = {
            name: {key: value.requires_grad_() for key, value in own.items()}
            for name, own in joined([part.more for part in cached]).items()
        }
        losses = self._of_batch(features, more)
        total = self._weighted(losses)
        if losses:
            total.backward()
        of_parts = self._carry_back(features, more)
        return self._told(total + self._weighted(of_parts), _added(losses, of_parts))

    def _carry_back(self, features: Features, more: ByObjective) -> dict[str, torch.Tensor]:
        """Embed again, with the gradients that the features were given; return the means of the losses of samples."""
        n = len(self.parts)
        grads = [None if leaf is None or leaf.grad is None else leaf.grad.chunk(n) for leaf in features[:2]]
        more_grads = in_parts({name: {k: v.grad for k, v in own.items()} for name, own in more.items()}, n)
        means: dict[str, torch.Tensor] = {}
        for part in range(n):
            with self.runtime.gradient_sync(self.model, now=part == n - 1):
                outputs = self._embed(part)
                # Its gradient is the loss's: features times the gradients they were given.
                told = [pair for pair in zip(outputs.features, grads, strict=False) if pair[1] is not None]
                surrogate = sum((own * grad[part]).sum() for own, grad in told)
                for scalar, leaf in zip(outputs.features[2:], features[2:], strict=True):
                    if scalar is not None:  # in shares, because under DDP every pass must reach every parameter
                        surrogate = surrogate + scalar * leaf.grad / n
                for name, own in outputs.more.items():
                    surrogate = surrogate + sum((own[key] * more_grads[part][name][key]).sum() for key in own)
                losses = {name: value / n for name, value in outputs.losses.items()}
                if losses:
                    surrogate = surrogate + self._weighted(losses)
                if outputs.idle is not None:
                    surrogate = surrogate + outputs.idle
                surrogate.backward()
                means = _added(means, {name: value.detach() for name, value in losses.items()})
        return means

    @torch.no_grad()
    def _targets(self) -> ByObjective:
        if not self.objectives:
            return {}
        of_parts = []
        for part, own in enumerate(self.parts):
            seed_step(*self.seed, self.runtime.rank, part)
            of_parts.append(self.model(*own))
        return {name: self.objectives[name].whole_targets(own) for name, own in joined(of_parts).items()}

    def _embed(self, part: int) -> Embedded:
        seed_step(*self.seed, self.runtime.rank, part)
        if self.plain:
            outputs = Embedded(self.model(*self.parts[part]), {}, {}, None)
        else:
            outputs = self.model(*self.parts[part], self.targets_of_parts[part])
        if outputs.features.text is None:
            return outputs
        text = outputs.features.text.unflatten(0, (-1, *self.caption_ids.shape[1:]))
        return outputs._replace(features=outputs.features._replace(text=text))

    def _of_batch(self, features: Features, more: ByObjective) -> dict[str, torch.Tensor]:
        losses = {}
        if self.loss is not None:
            losses[CONTRASTIVE] = loss_of_captions(self.loss, *features, self.caption_ids, **self.captions)
        for name, one in self.objectives.items():
            value = one.loss_of_batch(features, more.get(name, {}), self.targets[name])
            if value is not None:
                losses[name] = value
        return losses

    def _weighted(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weights = {name: one.options.weight for name, one in self.objectives.items()}
        return sum(value * weights[name] if name in weights else value for name, value in losses.items())

    def _told(self, total: torch.Tensor, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        told = {"loss": total.detach()}
        if not self.plain:
            told |= {f"{name}_loss": value.detach() for name, value in losses.items()}
        return told


def _added(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**left, **{name: left[name] + value if name in left else value for name, value in right.items()}}


def loss_of_captions(
    loss: nn.Module,
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale,
    logit_bias,
    caption_ids: torch.Tensor,
    between: float = 0.0,
    all_captions: bool = False,
) -> torch.Tensor:
    """Return the loss of images (b, E) with their texts (b, E), or its mean over K texts of each, (b, K, E).

    With `all_captions` it is one loss instead, in which each image's K texts are its matches among those of all.
    Then the mean of the loss of each two of the K, which match as an image and a text do, is added `between` times.
    """
    if text.ndim == 2:
        return loss(image, text, logit_scale, logit_bias, caption_ids=caption_ids)
    texts = list(zip(text.unbind(1), caption_ids.unbind(1), strict=True))
    if all_captions:
        value = loss(image, text.flatten(0, 1), logit_scale, logit_bias, caption_ids=caption_ids[:, 0])
    else:
        each = [loss(image, one, logit_scale, logit_bias, caption_ids=ids) for one, ids in texts]
        value = sum(each) / len(each)
    if between:
        both = itertools.combinations(texts, 2)
        each = [loss(one, two, logit_scale, logit_bias, caption_ids=ids) for (one, ids), (two, _) in both]
        value = value + between * sum(each) / len(each)
    return value
