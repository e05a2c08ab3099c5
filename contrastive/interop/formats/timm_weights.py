"""Names of timm's ViT weights and ours, and what its `head` is: a projection to an embedding space or a classifier."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.interop.formats.key_table import TensorNames, renamed_table, to_ours, to_theirs
from contrastive.log import warn
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig

TOWER = "image_tower."
PROJECTION = f"{TOWER}projection.weight"
HEAD_KEY = "contrastive_head"
"""What a folder of ours says its head is, in a key of config.json that timm passes over."""
# From our names to theirs, in this order: each pattern sees what those before it have made.
RENAMES = (
    (rf"^{TOWER}", ""),
    (r"^transformer\.", ""),
    (r"^head\.attention\.q_proj", "attn_pool.q"),
    (r"^head\.attention\.[kv]_proj", "attn_pool.kv"),
    (r"^head\.attention\.out_proj", "attn_pool.proj"),
    (r"^head\.probe", "attn_pool.latent"),
    (r"^head\.", "attn_pool."),
    (r"attention\.[qkv]_proj", "attn.qkv"),
    (r"attention\.out_proj", "attn.proj"),
    (r"^patch_embed", "patch_embed.proj"),
    (r"^position_embedding", "pos_embed"),
    (r"^class_token", "cls_token"),
    (r"^pre_norm", "norm_pre"),
)
# LayerScale multiplies what attention and MLP add, which is as if it multiplied their last layer.
SCALES = ((r"(blocks\.\d+\.)attn\.proj\.\w+$", r"\1ls1.gamma"), (r"(blocks\.\d+\.)mlp\.fc2\.\w+$", r"\1ls2.gamma"))
HeadKind = Literal["none", "projection", "classifier"]


def timm_names(config: ImageTowerConfig) -> list[str]:
    """Return our names of the tensors that timm has of such a tower, without projection or classifier.

    Positions are learned ones, and patches have a bias exactly where there is no pre_norm.
    """
    plain = replace(config, position="learned", projection=False, patch_bias=not config.pre_norm)
    with torch.device("meta"):
        return list(ImageModel(ImageModelConfig(config.width, plain)).state_dict())


def timm_table(names: Iterable[str], prefix: str = "", layer_scale: bool = False) -> list[TensorNames]:
    """Return the table of an image tower.

    Args:
        names: ours.
        prefix: what stands before each of timm's names.
        layer_scale: whether the blocks scale what they add (`init_values`).
    """
    unit_axes = {f"{prefix}pos_embed": 1, f"{prefix}cls_token": 2}
    return renamed_table(names, (*RENAMES, ("^", prefix)), (), unit_axes, SCALES if layer_scale else ())


def tower_to_theirs(
    weights: Mapping[str, torch.Tensor], config: ImageTowerConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return an image tower's weights by timm's names; sin-cos positions are written out, a bias it lacks is zero.

    Args:
        weights: by our names, with `image_tower.position_embedding` where that is a buffer too.
    """
    bias = f"{TOWER}patch_embed.bias"
    return to_theirs(timm_table(timm_names(config), prefix), {bias: torch.zeros(config.width), **weights})


def tower_to_ours(
    file: Mapping[str, torch.Tensor], skeleton: nn.Module, model: nn.Module, where: Path, prefix: str = ""
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tower's weights by our names and what each is called in the file; other keys stay as they are.

    LayerScale is folded into the layer before it, a missing bias is zero, and a class token without a position gets
    the position zero: the features stay what they are.

    Args:
        skeleton: timm's model, on the meta device; it says which of these there are.
        model: ours, which the weights are for.
    """
    known = {f"{prefix}{name}" for name in skeleton.state_dict()}
    names = [name for name in model.state_dict() if name.startswith(TOWER) and name != PROJECTION]
    layer_scale = not isinstance(skeleton.blocks[0].ls1, nn.Identity)
    table = timm_table(names, prefix, layer_scale)
    weights, theirs = to_ours([entry for entry in table if entry.theirs in known], file, where)
    for entry in table:
        if entry.theirs not in known:  # a layer without bias
            for name in entry.ours:
                weights[name] = torch.zeros(_bias_shape(weights, name))
    position = f"{TOWER}position_embedding"
    if f"{TOWER}class_token" in names and skeleton.no_embed_class and position in weights:
        weights[position] = torch.cat([torch.zeros_like(weights[position][:1]), weights[position]])
    return weights, theirs


def _bias_shape(weights: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    weight = weights.get(name.removesuffix("bias") + "weight")
    return (0,) if weight is None else tuple(weight.shape[:1])


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


def take_projection(
    weights: dict[str, torch.Tensor], theirs: dict[str, str], layer: str, where: Path, library: str
) -> None:
    """Rename a layer of the file to our projection, in place; UserError where its bias is not zero: ours has none."""
    theirs[PROJECTION] = f"{layer}.weight"
    if f"{layer}.weight" in weights:
        weights[PROJECTION] = weights.pop(f"{layer}.weight")
    bias = weights.pop(f"{layer}.bias", None)
    if bias is not None and bias.any():
        raise UserError(
            f"{where}: '{layer}.bias' is not zero, and our projection has no bias; {library} can load this model"
        )
