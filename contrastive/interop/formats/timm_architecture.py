"""Our image towers in timm's terms: what its ViTs can hold, name and config.json, and weights, which are read back too.

A tower of images of any shape is a NaFlexVit of timm's; its tensors are brought into the shapes of a plain ViT's.
P is the side of a patch in pixels, h and w rows and columns of positions, D the width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from contrastive.data.preprocess import PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.formats.evaluation_transform import taken_size, write_timm_transform
from contrastive.interop.formats.state_dicts import (
    TensorNames,
    patch_convolution,
    patch_linear,
    renamed_table,
    to_ours,
    to_theirs,
)
from contrastive.interop.formats.timm_vit import POOLS, build_on_meta, describe_vit, is_naflex
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig

THEIR_POOLS = {ours: theirs for theirs, ours in POOLS.items()}
# timm takes the epsilon of norms from the code of a name alone; the rest can be given as arguments. The first name
# is for attention pooling: timm fills a 'siglip' model of another pooling without complaint over missing weights.
BASES = {1e-6: ("vit_base_patch16_siglip_224", "vit_base_patch16_224"), 1e-5: ("vit_base_patch16_clip_224",) * 2}
# What has to agree for a name to be a tower's: neither how it is trained nor where its positions come from. Without
# pre_norm timm's patches have a bias, which can be zero.
SHAPE = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "class_token", "pre_norm")
SHAPE += ("activation", "norm_eps")
TOWER = "image_tower."
PROJECTION = f"{TOWER}projection.weight"
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
NAFLEX_RENAMES = (
    (r"^patch_embed\.", "embeds."),
    (r"^pos_embed", "embeds.pos_embed"),
    (r"^cls_token", "embeds.cls_token"),
)
"""From the names of timm's plain ViT to those of its NaFlexVit."""
NAFLEX_UNIT_AXES = {"embeds.pos_embed": 1, "embeds.cls_token": 2}
NAFLEX_BASE = "naflexvit_base_patch16_siglip"
"""The name of timm's that is a model of ours, of any shape by arguments; its LayerNorms have an epsilon of 1e-6."""


def timm_problems(config: ImageTowerConfig) -> list[str]:
    """Return the options that timm's ViT cannot express, each with what to do."""
    problems, possible = [], (1e-6,) if config.native else tuple(BASES)
    if config.norm_eps not in possible:
        known = " or ".join(map(str, possible))
        problems.append(f"model.image.norm_eps {config.norm_eps} (timm's ViTs have {known}; train with one of them)")
    if config.pre_norm and config.patch_bias:
        problems.append("model.image.pre_norm with model.image.patch_bias true (train with patch_bias false)")
    return problems


def timm_name(config: ImageTowerConfig, size: tuple[int, int]) -> tuple[str, dict]:
    """Return timm's name and the arguments that make it this tower; none where a name of the registry is it already.

    Args:
        config: one that `timm_problems` finds nothing in.
        size: (height, width) in pixels that the model takes.
    """
    registered = _registered_name(config, size)
    if registered is not None:
        return registered, {}
    base, sized = BASES[config.norm_eps][config.pool != "attention"], {"img_size": list(size)}
    if config.native:
        base, sized = NAFLEX_BASE, {"pos_embed_grid_size": [config.grid_size] * 2}
    return base, {
        **sized,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": mlp_ratio(config.width, config.mlp_dim),
        "class_token": config.class_token,
        "global_pool": THEIR_POOLS[config.pool],
        "fc_norm": False,
        "pool_include_prefix": config.pool == "attention" and config.class_token,
        "pre_norm": config.pre_norm,
        "act_layer": config.activation,
    }


def timm_description(config: ImageTowerConfig, preprocess: PreprocessConfig, num_classes: int = 0) -> dict:
    """Return timm's config.json; its model_args are empty where a name of the registry is this tower already."""
    name, arguments = timm_name(config, taken_size(preprocess, config.patch_size))
    return {
        "architecture": name,
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "fixed_input_size": not config.native,
            "first_conv": "embeds.proj" if config.native else "patch_embed.proj",
            "classifier": "head",
            **write_timm_transform(preprocess, config.patch_size),
        },
    }


def _registered_name(config: ImageTowerConfig, size: tuple[int, int]) -> str | None:
    """Return the name in timm's registry whose model has exactly this architecture and input size, or None."""
    import timm

    if size[0] != size[1]:
        return None
    # The keys tell of LayerScale, missing biases and the like, which can be read but not written.
    keys = {entry.theirs for entry in _table(_names(config), native=config.native)}
    kind = "siglip" if config.pool == "attention" else "siglip_gap" if not config.class_token else "clip*"
    patterns = (f"vit_*_patch{config.patch_size}_{kind}_{size[0]}", f"vit_*_patch{config.patch_size}_{size[0]}")
    for pattern in ("naflexvit_*_siglip",) if config.native else patterns:
        for name in timm.list_models(pattern):
            model = build_on_meta(name, Path(name), num_classes=0)
            try:
                found, taken = describe_vit(model, Path(name))
            except UserError:  # a ViT of another kind
                continue
            same = all(getattr(found, option) == getattr(config, option) for option in SHAPE) and taken == tuple(size)
            if same and keys == model.state_dict().keys() and not getattr(model, "no_embed_class", False):
                return name
    return None


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Return the factor for which int(width · factor), as both libraries compute it, is mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _names(config: ImageTowerConfig) -> list[str]:
    """Return our names of the tensors that timm has of such a tower, without projection or classifier.

    Positions are learned ones, and patches have a bias exactly where there is no pre_norm.
    """
    plain = replace(config, position="learned", projection=False, patch_bias=not config.pre_norm)
    with torch.device("meta"):
        return list(ImageModel(ImageModelConfig(config.width, plain)).state_dict())


def _table(
    names: Iterable[str], prefix: str = "", layer_scale: bool = False, native: bool = False
) -> list[TensorNames]:
    """Return the table of an image tower; `prefix` stands before each of timm's names.

    Args:
        layer_scale: whether the blocks scale what they add (`init_values`).
        native: of a NaFlexVit, as `_as_vit` makes its tensors.
    """
    axes = NAFLEX_UNIT_AXES if native else {"pos_embed": 1, "cls_token": 2}
    renames = (*RENAMES, *(NAFLEX_RENAMES if native else ()), ("^", prefix))
    unit_axes = {f"{prefix}{name}": count for name, count in axes.items()}
    return renamed_table(names, renames, (), unit_axes, SCALES if layer_scale else ())


def tower_to_theirs(
    weights: Mapping[str, torch.Tensor], config: ImageTowerConfig, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return an image tower's weights by timm's names; sin-cos positions are written out, a bias it lacks is zero.

    Args:
        weights: by our names, with `image_tower.position_embedding` where that is a buffer too.
    """
    bias, table = f"{TOWER}patch_embed.bias", _table(_names(config), prefix, native=config.native)
    made = to_theirs(table, {bias: torch.zeros(config.width), **weights})
    return _from_vit(made, prefix, config.grid_size) if config.native else made


def tower_to_ours(
    file: Mapping[str, torch.Tensor],
    skeleton: nn.Module,
    model: nn.Module,
    where: Path,
    prefix: str = "",
    projection: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tower's weights by our names and what each is called in the file; other keys stay as they are.

    LayerScale is folded into the layer before it, a missing bias is zero, and a class token without a position gets
    the position zero: the features stay what they are.

    Args:
        skeleton: timm's model, on the meta device; it says which of these there are.
        model: ours, which the weights are for.
        projection: the layer of the file that is our projection.

    Raises:
        UserError: that layer has a bias other than zero, which ours has not.
    """
    known = {f"{prefix}{name}" for name in skeleton.state_dict()}
    own = {name: value for name, value in model.state_dict().items() if name.startswith(TOWER) and name != PROJECTION}
    native = is_naflex(skeleton)
    if native:
        file = _as_vit(file, prefix, skeleton.embeds.patch_size[0])
    table = _table(own, prefix, not isinstance(skeleton.blocks[0].ls1, nn.Identity), native)
    there = [entry for entry in table if entry.theirs in known]
    if projection is not None:
        there.append(TensorNames(f"{projection}.weight", (PROJECTION,)))
    weights, theirs = to_ours(there, file, where)
    for entry in table:
        if entry.theirs not in known:  # a layer without bias
            weights |= {name: torch.zeros(own[name].shape) for name in entry.ours}
    position = f"{TOWER}position_embedding"
    if f"{TOWER}class_token" in own and (native or skeleton.no_embed_class) and position in weights:
        weights[position] = torch.cat([torch.zeros_like(weights[position][:1]), weights[position]])
    bias = None if projection is None else weights.pop(f"{projection}.bias", None)
    if bias is not None and bias.any():
        raise UserError(
            f"{where}: '{projection}.bias' is not zero, and our projection has no bias; "
            f"{'open_clip' if prefix else 'timm'} can load this model"
        )
    return weights, theirs


def _as_vit(file: Mapping[str, torch.Tensor], prefix: str, patch_size: int) -> dict[str, torch.Tensor]:
    """Return a NaFlexVit's tensors in the shapes of a plain ViT; `prefix` stands before each name.

    The patch embedding (D, P·P·3) becomes (D, 3, P, P), positions (1, h, w, D) become (1, h·w, D).
    """
    made, weight, position = dict(file), f"{prefix}embeds.proj.weight", f"{prefix}embeds.pos_embed"
    if weight in made:
        made[weight] = patch_convolution(made[weight], patch_size)
    if position in made and made[position].ndim == 4:
        made[position] = made[position].flatten(1, 2)
    return made


def _from_vit(file: Mapping[str, torch.Tensor], prefix: str, grid_size: int) -> dict[str, torch.Tensor]:
    """Return tensors of a plain ViT, by a NaFlexVit's names, in its shapes; a class token takes its position along."""
    weight, position, token = (f"{prefix}embeds.{name}" for name in ("proj.weight", "pos_embed", "cls_token"))
    made = {**file, weight: patch_linear(file[weight])}
    if token in file:
        made[token] = file[token] + file[position][:, :1]
    made[position] = file[position][:, -(grid_size**2) :].unflatten(1, (grid_size, grid_size)).contiguous()
    return made
