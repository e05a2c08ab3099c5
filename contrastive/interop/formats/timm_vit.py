"""timm's ViTs and our options and weights: what a name of timm's stands for, and which name a tower of ours has.

Hyper-parameters of a name live in timm's code alone. They are read off a model that timm builds on the meta device:
it has shapes and no memory.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from contrastive.data.preprocess import PreprocessConfig
from contrastive.errors import UserError, reason_of
from contrastive.files import check_sizes, read_json
from contrastive.interop.formats import timm_naflex
from contrastive.interop.formats.evaluation_transform import taken_size, whole_patches, write_timm_transform
from contrastive.interop.formats.state_dicts import TensorNames, renamed_table, to_ours, to_theirs
from contrastive.interop.formats.timm_naflex import is_naflex
from contrastive.log import warn
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig
from contrastive.models.transformer import MOST

POOLS = {"token": "class", "avg": "average", "map": "attention"}
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
        size = timm_naflex.position_size(model) if native else tuple(size or model.patch_embed.img_size)
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
    found |= timm_naflex.strange_naflex(model) if native else {}
    return [name for name, is_so in found.items() if is_so]


def _activation(module: nn.Module) -> str | None:
    """Return our name of an activation of timm, None for one that we have not."""
    if getattr(module, "approximate", "none") == "tanh":  # of torch's GELU
        return "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(module).__name__)


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
        base, sized = timm_naflex.BASE, {"pos_embed_grid_size": [config.grid_size] * 2}
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
    """Return the table of an image tower.

    Args:
        names: ours.
        prefix: what stands before each of timm's names.
        layer_scale: whether the blocks scale what they add (`init_values`).
        native: of a NaFlexVit, as `timm_naflex.as_vit` makes its tensors.
    """
    axes = timm_naflex.UNIT_AXES if native else {"pos_embed": 1, "cls_token": 2}
    renames = (*RENAMES, *(timm_naflex.RENAMES if native else ()), ("^", prefix))
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
    return timm_naflex.from_vit(made, prefix, config.grid_size) if config.native else made


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
        file = timm_naflex.as_vit(file, prefix, skeleton.embeds.patch_size[0])
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
