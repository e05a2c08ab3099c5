"""Modules of objectives as a folder beside a model: objectives/ of a checkpoint, of final/ where asked to keep them.

model.safetensors   weights by parameter name, 'objectives.NAME. ...'
ema.safetensors     averaged ones, where the run keeps them
config.json         the options of each, by its name
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from contrastive.files import write_json
from contrastive.objectives.learner import objective_weights
from contrastive.objectives.objective import Objective, Tensors


def save_objectives(folder: Path, objectives: Iterable[Objective], weights: Tensors, ema: Tensors | None) -> None:
    """Write those of the objectives whose weights are there; nothing where there are none."""
    found = {one.name: one for one in objectives if objective_weights(weights, [one])}
    if not found:
        return
    folder.mkdir()
    for name, tensors in (("model", weights), ("ema", ema)):
        if tensors is not None:
            own = objective_weights(tensors, found.values())
            save_file({k: v.detach().cpu().contiguous() for k, v in own.items()}, folder / f"{name}.safetensors")
    write_json(folder / "config.json", {name: asdict(one.options) for name, one in found.items()})
