"""timm's ViTs as our options: what a name of timm's stands for, of a folder of timm's or of open_clip's.

Hyper-parameters of a name live in timm's code alone. They are read off a model that timm builds on the meta device:
it has shapes and no memory.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.errors import UserError, reason_of
from contrastive.files import check_sizes, read_json
from contrastive.interop.formats.evaluation_transform import both_sides, whole_patches
from contrastive.log import warn
from contrastive.models import ImageTowerConfig
from contrastive.models.transformer import MOST

POOLS = {"token": "class", "avg": "average", "map": "attention"}
LOCAL, HUB = "local-dir:", "hf-hub:"
PLACES = (LOCAL, HUB)
"""What a name of an image tower begins with where it is the place of timm's config.json."""


def is_naflex(model: nn.Module) -> bool:
    """Whether a model of timm is a NaFlexVit."""
    return type(model).__name__ == "NaFlexVit"


def build_on_meta(name: str, where: Path, **arguments) -> nn.Module:
    """Return timm's model of this name without memory for its weights.

    Args:
        name: of timm's registry, or 'local-dir:FOLDER' with timm's config.json in it.
        where: the file that names it, for messages.

    Raises:
        UserError: timm is not installed, or cannot build it.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"{where} names a model of timm, which is not installed: pip install timm") from None
    scheme, _, folder = name.partition("local-dir:")
    if folder and not scheme:  # timm builds what it says, block by block, before anything is compared
        check_sizes(read_json(Path(folder) / "config.json"), where, MOST)
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # whatever an unknown name or argument comes to inside timm
        raise UserError(f"{where}: timm cannot build its model: {reason_of(error)}") from None


def describe_vit(
    model: nn.Module, where: Path, size: tuple[int, int] | None = None
) -> tuple[ImageTowerConfig, tuple[int, int]]:
    """Return our options for a ViT of timm, its classifier left aside, and the (height, width) of its images in pixels.

    The options hold the height alone, as far as patches fill it; `set_input_size` makes a tower of oblong images. Of a
    NaFlexVit the size is that which its positions are made for.

    Args:
        size: (height, width) of the images, where it is not the model's own.

    Raises:
        UserError: it has parts that our tower has not; all of them are named.
    """
    problems, native = _strange_parts(model), is_naflex(model)
    if not problems:  # the options of such a model can be read off
        size = _position_size(model) if native else tuple(size or model.patch_embed.img_size)
        problems = _strange_options(model, size)
    if problems:
        raise UserError(f"{where}: our ViT has no {', no '.join(problems)}; timm itself can load this model")
    embedding = model.embeds if native else model.patch_embed
    block, patch, pool = model.blocks[0], embedding.patch_size[0], model.global_pool
    if not pool:
        pool, taken = ("token", "the class token") if model.has_class_token else ("avg", "the mean of the patches")
        warn(f"{where}: the model has no pooling of its own (global_pool ''); encode_image takes {taken}")
    config = ImageTowerConfig(
        image_size=whole_patches(size, patch)[0],
        patch_size=patch,
        width=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features,
        pool=POOLS[pool],
        class_token=model.has_class_token,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        patch_bias=embedding.proj.bias is not None,
        activation=_activation(block.mlp.act),
        norm_eps=next(module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)),
        patch_dropout=0.0 if native else getattr(model.patch_drop, "prob", 0.0),
        native=native,
    )
    return config, size


def _strange_parts(model: nn.Module) -> list[str]:
    """Modules of other kinds than our tower's."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    native = is_naflex(model)
    if type(model) is not VisionTransformer and not native:
        return [f"'{type(model).__name__}'"]
    if not len(model.blocks):
        return ["depth of 0"]
    block = next((block for block in model.blocks if type(block) is not Block), model.blocks[0])
    kinds = [] if native else [("patch embedding", model.patch_embed, PatchEmbed)]
    kinds.append(("block", block, Block))
    if type(block) is Block:
        kinds += [("attention", block.attn, Attention), ("mlp", block.mlp, Mlp)]
        norm = next((each.norm1 for each in model.blocks if not isinstance(each.norm1, nn.LayerNorm)), block.norm1)
        kinds.append(("norm", norm, type(norm) if isinstance(norm, nn.LayerNorm) else nn.LayerNorm))
    return [f"{name} '{type(part).__name__}'" for name, part, kind in kinds if type(part) is not kind]


def _strange_options(model: nn.Module, size: tuple[int, int]) -> list[str]:
    block, pool, native = model.blocks[0], model.global_pool, is_naflex(model)
    embedding = model.embeds if native else model.patch_embed
    patch = embedding.patch_size
    fc_norm = not isinstance(model.fc_norm, nn.Identity)
    takes_prefix = model.pool_include_prefix if pool == "map" else not model.pool_include_prefix
    found = {
        f"{model.in_chans} input channels": model.in_chans != 3,
        f"oblong patches {patch}": patch[0] != patch[1],
        "norm of the patch embedding (embed_norm_layer)": not isinstance(embedding.norm, nn.Identity),
        f"register tokens (reg_tokens={model.num_reg_tokens})": model.num_reg_tokens > 0,
        "model without position embedding (pos_embed='none')": not native and model.pos_embed is None,
        "norm of queries and keys (qk_norm)": not isinstance(block.attn.q_norm, nn.Identity),
        "norm inside attention (scale_attn_norm)": not isinstance(block.attn.norm, nn.Identity),
        "norm inside the MLP (scale_mlp_norm)": not isinstance(block.mlp.norm, nn.Identity),
        f"padding of images that patches do not fill (dynamic_img_pad, {size[0]}×{size[1]} pixels)": (
            embedding.dynamic_img_pad and any(side % patch[0] for side in size)
        ),
        f"activation '{type(block.mlp.act).__name__}'": _activation(block.mlp.act) is None,
        f"pooling global_pool='{pool}'": pool not in (*POOLS, ""),
        "norm behind the pooling (fc_norm)": fc_norm,  # its tokens have no norm, those of our towers have
        "model without a final norm (final_norm=False)": isinstance(model.norm, nn.Identity) and not fc_norm,
        f"such treatment of the class token in pooling (pool_include_prefix={model.pool_include_prefix})": (
            pool in ("map", "avg") and model.num_prefix_tokens > 0 and not takes_prefix
        ),
    }
    found |= _strange_naflex(model) if native else {}
    return [name for name, is_so in found.items() if is_so]


def _position_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) in pixels of an image with as many patches as there are positions; learned ones."""
    if model.embeds.pos_embed is None:
        return model.embeds.patch_size
    return tuple(n * side for n, side in zip(model.embeds.pos_embed.shape[1:3], model.embeds.patch_size, strict=True))


def _strange_naflex(model: nn.Module) -> dict[str, bool]:
    """What the embedding and the pooling of a NaFlexVit may have that ours has not, by name."""
    embeds, block, pool = model.embeds, model.blocks[0], model.attn_pool
    height, width = _position_size(model)
    mode = embeds.pos_embed_interp_mode
    switches = ("pos_embed_ar_preserving", "pos_embed_align_corners", "pos_embed_use_grid_sample")
    return {
        "patch embedding by a convolution (embed_proj_type)": not embeds.is_linear,
        "patches with the channel first (patchify_channels_last=False)": not embeds.channels_last,
        "norm of the patches (input_norm_layer)": embeds.norm_input is not None,
        f"patches of {embeds.patch_size[0]} pixels": embeds.patch_size[0] < 1,
        f"positions of another kind (pos_embed='{embeds.pos_embed_type}')": embeds.pos_embed_type != "learned",
        f"oblong grid of positions ({height}×{width} pixels)": height != width,
        f"resampling of positions by pos_embed_interp_mode='{mode}'": mode != "bilinear",
        "resampling of positions without pos_embed_antialias": not embeds.pos_embed_antialias,
        **{f"resampling of positions with {name}": getattr(embeds, name) for name in switches},
        "rotary positions (rope_type)": model.rope is not None,
        "pooling of other heads than the blocks' (attn_pool_num_heads, attn_pool_mlp_ratio)": pool is not None
        and (pool.num_heads, pool.mlp.fc1.out_features) != (block.attn.num_heads, block.mlp.fc1.out_features),
    }


def _activation(module: nn.Module) -> str | None:
    """Return our name of an activation of timm, None for one that we have not."""
    if getattr(module, "approximate", "none") == "tanh":  # of torch's GELU
        return "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(module).__name__)


def read_trunk(
    cfg: Mapping[str, Any], embed_dim: int, folder: Path, where: Path
) -> tuple[nn.Module, ImageTowerConfig, tuple[int, int]]:
    """Return timm's tower on the meta device, our options for it, and the (height, width) of its images: vision_cfg's.

    It is made with the calls that open_clip's TimmModel makes.

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
    arguments |= _timm_arguments(cfg["timm_model_kwargs"] or {}, where)
    if projection == "linear":
        trunk = build_on_meta(name, where, **arguments)
        try:
            trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
        except AssertionError as error:
            raise UserError(f"{where}: vision_cfg.timm_pool '{pool}' does not fit '{name}': {error}") from None
    else:
        num_classes = 0 if projection else embed_dim
        trunk = build_on_meta(name, where, **arguments | {"num_classes": num_classes, "global_pool": pool})
    image, size = describe_vit(trunk, where, both_sides(cfg["image_size"]))
    if cfg["image_seq_len"] and not image.native:
        raise UserError(
            f"{where}: vision_cfg.image_seq_len {cfg['image_seq_len']} is for image towers that take any shape, and "
            f"'{cfg['timm_model_name']}' takes one size; leave it out"
        )
    return trunk, replace(image, projection=projection != "none"), size


def _timm_arguments(given: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """Return `timm_model_kwargs`, if they say what the tower is; UserError where they say what to read or run."""
    files = [name for name in given if re.search("pretrained|checkpoint|cache|cfg", name)]
    if files:
        raise UserError(
            f"{where}: vision_cfg.timm_model_kwargs has '{files[0]}', which is no option of the tower; leave it out"
        )
    check_sizes(given, where, MOST)
    return given


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
