"""Learning rates that fall from a tower's top to its bottom (Clark et al. 2020, "ELECTRA"; Bao et al. 2021, "BEiT")."""

import re

from torch import nn


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by, by name.

    The last block of a tower has `decay`, each one below it `decay` times the one above, the patch or token
    embedding with its positions that of a block below the first. All above the blocks, heads included, has 1.
    """
    depths = {name: len(tower.transformer.blocks) for name, tower in model.named_children() if _is_tower(tower)}
    return {name: decay ** _layers_below_top(name, depths) for name, _ in model.named_parameters()}


def _is_tower(module: nn.Module) -> bool:
    return hasattr(module, "transformer")


def _layers_below_top(name: str, depths: dict[str, int]) -> int:
    tower, _, rest = name.partition(".")
    if tower not in depths:
        return 0
    block = re.match(r"transformer\.blocks\.(\d+)\.", rest)
    if block:
        return depths[tower] - int(block[1])
    embeds = rest.split(".")[0] in ("patch_embed", "token_embedding", "class_token", "position_embedding", "pre_norm")
    return depths[tower] + 1 if embeds else 0
