"""Names of timm's ViT weights and ours, and what its `head` is: a projection to an embedding space or a classifier."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.interop.formats.key_table import Entry, to_ours, to_theirs
from contrastive.log import warn
from contrastive.models import ImageTowerConfig

TOWER = "image_tower."
PROJECTION = f"{TOWER}projection.weight"
HEAD_KEY = "contrastive_head"
"""What a folder of ours says its head is, in a key of config.json that timm passes over."""
HeadKind = Literal["none", "projection", "classifier"]


def tower_table(config: ImageTowerConfig, prefix: str = "", layer_scale: bool = False) -> list[Entry]:
    """Return the table of an image tower, without projection or classifier.

    Args:
        prefix: what stands before each of timm's names.
        layer_scale: whether the blocks scale what they add (`init_values`).
    """
    table = [Entry(f"{prefix}pos_embed", (f"{TOWER}position_embedding",), unit_axes=1)]
    table += _layer(f"{prefix}patch_embed.proj", f"{TOWER}patch_embed", bias=config.patch_bias)
    if config.class_token:
        table.append(Entry(f"{prefix}cls_token", (f"{TOWER}class_token",), unit_axes=2))
    if config.pre_norm:
        table += _layer(f"{prefix}norm_pre", f"{TOWER}pre_norm")
    for index in range(config.depth):
        theirs, ours = f"{prefix}blocks.{index}.", f"{TOWER}transformer.blocks.{index}."
        scales = (f"{theirs}ls1.gamma", f"{theirs}ls2.gamma") if layer_scale else (None, None)
        table += _layer(f"{theirs}norm1", f"{ours}norm1")
        table += _layer(f"{theirs}attn.qkv", *(f"{ours}attention.{part}_proj" for part in "qkv"))
        table += _layer(f"{theirs}attn.proj", f"{ours}attention.out_proj", scale=scales[0])
        table += _layer(f"{theirs}norm2", f"{ours}norm2")
        table += _layer(f"{theirs}mlp.fc1", f"{ours}mlp.fc1")
        table += _layer(f"{theirs}mlp.fc2", f"{ours}mlp.fc2", scale=scales[1])
    table += _layer(f"{prefix}norm", f"{TOWER}norm")
    if config.pool == "attention":
        theirs, ours = f"{prefix}attn_pool.", f"{TOWER}head."
        table.append(Entry(f"{theirs}latent", (f"{ours}probe",)))
        table += _layer(f"{theirs}q", f"{ours}attention.q_proj")
        table += _layer(f"{theirs}kv", f"{ours}attention.k_proj", f"{ours}attention.v_proj")
        table += _layer(f"{theirs}proj", f"{ours}attention.out_proj")
        table += _layer(f"{theirs}norm", f"{ours}norm")
        table += _layer(f"{theirs}mlp.fc1", f"{ours}mlp.fc1") + _layer(f"{theirs}mlp.fc2", f"{ours}mlp.fc2")
    return table


def written_table(config: ImageTowerConfig, prefix: str = "") -> list[Entry]:
    """Return the table of a tower as it is written: timm's patches have a bias exactly where there is no pre_norm."""
    return tower_table(replace(config, patch_bias=not config.pre_norm), prefix)


def tower_to_theirs(
    weights: Mapping[str, torch.Tensor], config: ImageTowerConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return an image tower's weights by timm's names; sin-cos positions are written out, a bias it lacks is zero.

    Args:
        weights: by our names, with `image_tower.position_embedding` where that is a buffer too.
    """
    bias = f"{TOWER}patch_embed.bias"
    return to_theirs(written_table(config, prefix), {bias: torch.zeros(config.width), **weights})


def tower_to_ours(
    file: Mapping[str, torch.Tensor], model: nn.Module, config: ImageTowerConfig, where: Path, prefix: str = ""
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tower's weights by our names and what each is called in the file; other keys stay as they are.

    LayerScale is folded into the layer before it, a missing bias is zero, and a class token without a position gets
    the position zero: the features stay what they are.

    Args:
        model: timm's, on the meta device; it says which of these there are.
    """
    layer_scale = not isinstance(model.blocks[0].ls1, nn.Identity)
    known = {f"{prefix}{name}" for name in model.state_dict()}
    table = [entry for entry in tower_table(config, prefix, layer_scale) if entry.theirs in known]
    weights, theirs = to_ours(table, file, where)
    for entry in tower_table(config, prefix):
        if entry.theirs not in known:  # a layer without bias
            for name in entry.ours:
                weights[name] = torch.zeros(_bias_shape(weights, name))
    position = f"{TOWER}position_embedding"
    if config.class_token and model.no_embed_class and position in weights:
        weights[position] = torch.cat([torch.zeros_like(weights[position][:1]), weights[position]])
    return weights, theirs


def head_kind(
    description: Mapping, num_classes: int, label_names: object, weights: Mapping[str, torch.Tensor], where: Path
) -> HeadKind:
    """Return what the head of a model is.

    Our own folders say so in config.json, under a key that timm passes over. For others, a head whose bias is zero
    throughout is a projection, as timm keeps those of CLIP, unless `label_names` name its rows; a warning says so
    where the architecture is none of CLIP's.

    Args:
        description: config.json. where: that file, for messages.

    Raises:
        UserError: our key has a value that it cannot have here.
    """
    if HEAD_KEY in description:
        kind = description[HEAD_KEY]
        if kind not in get_args(HeadKind) or (kind == "none") != (num_classes == 0):
            raise UserError(
                f"{where}: {HEAD_KEY} {kind!r} with num_classes {num_classes}; without classes it has to be 'none', "
                "else 'projection' or 'classifier'"
            )
        return kind
    if num_classes == 0:
        return "none"
    zero = {"head.weight", "head.bias"} <= weights.keys() and not weights["head.bias"].any()
    if label_names or not zero:
        return "classifier"
    if "clip" not in str(description.get("architecture")):
        warn(
            f"{where}: the bias of the head is zero, so its {num_classes:,} rows are taken for a projection into an "
            f'embedding space; for a classifier add "{HEAD_KEY}": "classifier"'
        )
    return "projection"


def drop_zero_bias(weights: dict[str, torch.Tensor], name: str, where: Path, library: str) -> None:
    """Leave the bias of a projection out; UserError where it is not zero, since our projection has none."""
    bias = weights.pop(name, None)
    if bias is not None and bias.any():
        raise UserError(f"{where}: '{name}' is not zero, and our projection has no bias; {library} can load this model")


def _layer(theirs: str, *ours: str, bias: bool = True, scale: str | None = None) -> list[Entry]:
    parts = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{theirs}.{part}", tuple(f"{name}.{part}" for name in ours), scale=scale) for part in parts]


def _bias_shape(weights: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    weight = weights.get(name.removesuffix("bias") + "weight")
    return (0,) if weight is None else tuple(weight.shape[:1])
