"""Names of open_clip's weights and ours; its image towers that are models of timm (`timm_model_name`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.formats.key_table import Entry, to_ours
from contrastive.interop.formats.timm_vit import build_on_meta, describe
from contrastive.interop.formats.timm_weights import PROJECTION, drop_zero_bias, tower_to_ours
from contrastive.log import warn
from contrastive.models import ImageTowerConfig, TextTowerConfig

VISUAL, TRUNK = "visual.", "visual.trunk."
TRUNK_PROJECTION = Entry(f"{VISUAL}head.proj.weight", (PROJECTION,))
"""Behind a tower of timm."""
LOCAL, HUB = "local-dir:", "hf-hub:"
PLACES = (LOCAL, HUB)
"""What a name of an image tower begins with where it is the place of timm's config.json."""


def image_table(config: ImageTowerConfig, layer_scale: bool = False) -> list[Entry]:
    """Return the table of a native image tower."""
    ours = "image_tower."
    table = [
        Entry(f"{VISUAL}class_embedding", (f"{ours}class_token",)),
        Entry(f"{VISUAL}positional_embedding", (f"{ours}position_embedding",)),
        Entry(f"{VISUAL}conv1.weight", (f"{ours}patch_embed.weight",)),
        Entry(f"{VISUAL}proj", (PROJECTION,), transposed=True),
    ]
    if config.pre_norm:
        table += _layer(f"{VISUAL}ln_pre", f"{ours}pre_norm")
    table += _blocks(f"{VISUAL}transformer.resblocks.", f"{ours}transformer.blocks.", config.depth, layer_scale)
    return table + _layer(f"{VISUAL}ln_post", f"{ours}norm")


def text_table(config: TextTowerConfig, prefix: str, layer_scale: bool = False) -> list[Entry]:
    """Return the table of a text tower.

    Args:
        prefix: '' of open_clip's class CLIP, 'text.' of its CustomTextCLIP (`custom_text` in the config).
    """
    ours = "text_tower."
    table = [
        Entry(f"{prefix}token_embedding.weight", (f"{ours}token_embedding.weight",)),
        Entry(f"{prefix}positional_embedding", (f"{ours}position_embedding",)),
    ]
    table += _blocks(f"{prefix}transformer.resblocks.", f"{ours}transformer.blocks.", config.depth, layer_scale)
    table += _layer(f"{prefix}ln_final", f"{ours}norm")
    if config.projection and config.projection_bias:  # a Linear of theirs, else a plain matrix
        table += _layer(f"{prefix}text_projection", f"{ours}projection")
    elif config.projection:
        table.append(Entry(f"{prefix}text_projection", (f"{ours}projection.weight",), transposed=True))
    return table


def scalar_table(bias: bool, unit_axes: int = 0) -> list[Entry]:
    """Return the table of the scale and, where there is one, the bias of the logits."""
    names = ("logit_scale", "logit_bias") if bias else ("logit_scale",)
    return [Entry(name, (name,), unit_axes=unit_axes) for name in names]


def build_trunk(cfg: Mapping[str, Any], embed_dim: int, folder: Path, where: Path) -> nn.Module:
    """Return the tower on the meta device, made with the calls that open_clip's TimmModel makes.

    A name that is a place ('local-dir:...', 'hf-hub:...') stands for timm's config.json beside the weights, so that
    a folder can be moved.

    Raises:
        UserError: timm cannot build it, config.json is missing, or its pooling or projection is none of ours.
    """
    name, pool, projection = cfg["timm_model_name"], cfg["timm_pool"], cfg["timm_proj"]
    if projection not in ("linear", "none", "", None):
        raise UserError(f"{where}: vision_cfg.timm_proj '{projection}' is no projection of ours; open_clip can load it")
    if pool in ("abs_attn", "rot_attn"):
        raise UserError(f"{where}: vision_cfg.timm_pool '{pool}' is no pooling of ours; open_clip can load it")
    if name.startswith(PLACES):
        if not (folder / "config.json").exists():
            raise UserError(f"{where} names its image tower '{name}', but timm's config.json is not in {folder}")
        _compare_places(name, folder, where)
        name = f"local-dir:{folder}"
    arguments = {"patch_drop_rate": cfg["patch_dropout"]} if cfg["patch_dropout"] > 0 else {}
    if projection != "linear":
        return build_on_meta(name, where, num_classes=embed_dim if not projection else 0, global_pool=pool, **arguments)
    trunk = build_on_meta(name, where, **arguments)
    try:
        trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    except AssertionError as error:
        raise UserError(f"{where}: vision_cfg.timm_pool '{pool}' does not fit '{name}': {error}") from None
    return trunk


def describe_trunk(trunk: nn.Module, cfg: Mapping[str, Any], where: Path) -> tuple[ImageTowerConfig, tuple[int, int]]:
    """Return our options for the tower and the (height, width) of its images, which are vision_cfg's."""
    side = cfg["image_size"]
    image, size = describe(trunk, where, (side, side) if isinstance(side, int) else tuple(side))
    return replace(image, projection=cfg["timm_proj"] != "none"), size


def trunk_to_ours(
    file: Mapping[str, torch.Tensor], trunk: nn.Module, image: ImageTowerConfig, projection: str | None, where: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tower's weights by our names and what each is called in the file; other keys stay as they are.

    Raises:
        UserError: the projection has a bias other than zero, which ours has not.
    """
    weights, theirs = tower_to_ours(file, trunk, image, where, TRUNK)
    if projection == "linear":
        weights, more = to_ours([TRUNK_PROJECTION], weights, where)
        theirs |= more
        drop_zero_bias(weights, "visual.head.proj.bias", where, "open_clip")
    elif projection != "none":  # timm's own head
        theirs[PROJECTION] = f"{TRUNK}head.weight"
        if f"{TRUNK}head.weight" in weights:
            weights[PROJECTION] = weights.pop(f"{TRUNK}head.weight")
        drop_zero_bias(weights, f"{TRUNK}head.bias", where, "open_clip")
    return weights, theirs


def _compare_places(name: str, folder: Path, where: Path) -> None:
    """Warn where a folder that is named describes another tower than the config.json beside the weights."""
    own, other = read_json(folder / "config.json"), Path(name.removeprefix(LOCAL)) / "config.json"
    if not name.startswith(LOCAL) or not other.is_file():
        return
    try:
        named = read_json(other)
    except UserError:
        return
    if any(named.get(key) != own.get(key) for key in ("architecture", "num_classes", "model_args")):
        warn(f"{where}: open_clip would take the image tower of {other}, another one; {folder / 'config.json'} is used")


def _blocks(theirs: str, ours: str, depth: int, layer_scale: bool) -> list[Entry]:
    table = []
    for index in range(depth):
        block, own = f"{theirs}{index}.", f"{ours}{index}."
        scales = (f"{block}ls_1.gamma", f"{block}ls_2.gamma") if layer_scale else (None, None)
        for part in ("weight", "bias"):
            projections = tuple(f"{own}attention.{name}_proj.{part}" for name in "qkv")
            table.append(Entry(f"{block}attn.in_proj_{part}", projections))
        table += _layer(f"{block}attn.out_proj", f"{own}attention.out_proj", scales[0])
        table += _layer(f"{block}ln_1", f"{own}norm1") + _layer(f"{block}ln_2", f"{own}norm2")
        table += _layer(f"{block}mlp.c_fc", f"{own}mlp.fc1") + _layer(f"{block}mlp.c_proj", f"{own}mlp.fc2", scales[1])
    return table


def _layer(theirs: str, ours: str, scale: str | None = None) -> list[Entry]:
    return [Entry(f"{theirs}.{part}", (f"{ours}.{part}",), scale=scale) for part in ("weight", "bias")]
