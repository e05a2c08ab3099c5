"""The model with the objectives of its run beside it: what the loop trains, and what it saves apart."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from contrastive.distributed.sharding import is_sharded
from contrastive.files import write_json
from contrastive.models import DualEncoder, Features, ImageModel, ImageModelConfig, ModelConfig, PackedTokens
from contrastive.models.init import initialise_tower
from contrastive.objectives.objective import MicroBatch, Objective, Tensors
from contrastive.patches import Patches

PREFIX = "objectives."
"""What the names of parameters that are no part of the model begin with."""
ByObjective = dict[str, dict[str, torch.Tensor]]


class Embedded(NamedTuple):
    """What a micro-batch of b' samples has come to."""

    features: Features
    more: ByObjective
    """Further features of each objective, (b', E)."""
    losses: dict[str, torch.Tensor]
    """Means over the micro-batch, scalars; none where no gradients are recorded."""
    idle: torch.Tensor | None
    """0, from all parameters that no loss of this step reaches: DDP waits for the gradients of all."""


class Learning(nn.Module):
    """A model whose forward pass feeds objectives too. Its own weights have the names that they always have."""

    objectives: nn.ModuleDict
    """Of Objective."""

    def active(self, step: int) -> dict[str, Objective]:
        """Return those that take part in a step, counted from 0."""
        return {name: one for name, one in self.objectives.items() if step >= one.first_step}

    def forward(
        self,
        pixels: torch.Tensor | Patches,
        texts: torch.Tensor | PackedTokens,
        inputs: Mapping[str, Tensors] | None = None,
        targets: Mapping[str, Tensors] | None = None,
    ) -> Features | ByObjective | Embedded:
        """Return the targets of the objectives in `inputs`; with `targets` given, what those and the features come to.

        Without inputs it is the model's own forward pass. See `MicroBatch` for pixels and texts.
        """
        if inputs is None:
            return super().forward(pixels, texts)
        part = MicroBatch(self, pixels, texts)
        taking_part = {name: self.objectives[name] for name in inputs}
        if targets is None:
            return {name: one.targets(part, inputs[name]) for name, one in taking_part.items()}
        # First what is embedded twice where there are micro-batches: random numbers are then drawn in the same order.
        features = part.features
        more = {name: one.features(part, inputs[name]) for name, one in taking_part.items()}
        losses = {}
        if torch.is_grad_enabled():  # without, it is the features alone that are wanted
            losses = {name: one.loss(part, inputs[name], targets[name]) for name, one in taking_part.items()}
        losses = {name: loss for name, loss in losses.items() if loss is not None}
        return Embedded(features, more, losses, self._idle(inputs))

    def _idle(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        if not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled()):
            return None
        idle = [p for p in self.idle_parameters(inputs) if p.requires_grad]
        if any(map(is_sharded, self.parameters())):  # FSDP waits for nothing
            return None
        return sum(p.sum() for p in idle) * 0 if idle else None

    def idle_parameters(self, active: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return the parameters of the objectives that are not active."""
        resting = (one for name, one in self.objectives.items() if name not in active)
        return list(itertools.chain.from_iterable(one.parameters() for one in resting))


class Learner(Learning, DualEncoder):
    """A dual encoder and its objectives."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.objectives = nn.ModuleDict()


class ImageLearner(Learning, ImageModel):
    """An image tower that nothing but objectives train; there are no texts beside its features."""

    def __init__(self, config: ModelConfig):
        super().__init__(ImageModelConfig(config.embed_dim, config.image))
        initialise_tower(self.image_tower, config.init)
        self.objectives = nn.ModuleDict()

    def idle_parameters(self, active: Mapping[str, Any]) -> list[nn.Parameter]:
        """As of every model; with those of the pooling, where all that is active reads patches alone."""
        idle = super().idle_parameters(active)
        if all(self.objectives[name].reads == "patches" for name in active):
            named = self.image_tower.named_parameters()
            idle += [parameter for name, parameter in named if name.startswith(("head.", "projection."))]
        return idle


def own_weights(weights: Tensors) -> dict[str, torch.Tensor]:
    """Return those of the model."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}


def objective_weights(weights: Tensors, objectives: Iterable[Objective]) -> dict[str, torch.Tensor]:
    """Return those of these objectives."""
    prefixes = tuple(f"{PREFIX}{one.name}." for one in objectives)
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}


def save_objectives(folder: Path, objectives: Iterable[Objective], weights: Tensors, ema: Tensors | None) -> None:
    """Write the folder objectives/ with those of the objectives whose weights are there; nothing where there are none.

    model.safetensors   weights by parameter name, 'objectives.NAME. ...'
    ema.safetensors     averaged ones, where the run keeps them
    config.json         the options of each, by its name
    """
    found = {one.name: one for one in objectives if objective_weights(weights, [one])}
    if not found:
        return
    folder.mkdir()
    for name, tensors in (("model", weights), ("ema", ema)):
        if tensors is not None:
            own = objective_weights(tensors, found.values())
            save_file({k: v.detach().cpu().contiguous() for k, v in own.items()}, folder / f"{name}.safetensors")
    write_json(folder / "config.json", {name: asdict(one.options) for name, one in found.items()})
