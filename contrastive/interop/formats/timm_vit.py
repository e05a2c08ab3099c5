"""timm's ViTs and our options: what a name of timm's stands for, and which name an image tower of ours has.

Hyper-parameters of a name live in timm's code alone. They are read off a model that timm builds on the meta device:
it has shapes and no memory.
"""

from pathlib import Path

from torch import nn

from contrastive.errors import UserError
from contrastive.interop.formats.evaluation_transform import whole_patches
from contrastive.interop.formats.timm_weights import timm_names, timm_table
from contrastive.log import warn
from contrastive.models import ImageTowerConfig

POOLS = {"token": "class", "avg": "average", "map": "attention"}
THEIR_POOLS = {ours: theirs for theirs, ours in POOLS.items()}
# timm takes the epsilon of norms from the code of a name alone; the rest can be given as arguments. The first name
# is for attention pooling: timm fills a 'siglip' model of another pooling without complaint over missing weights.
BASES = {1e-6: ("vit_base_patch16_siglip_224", "vit_base_patch16_224"), 1e-5: ("vit_base_patch16_clip_224",) * 2}


def build_on_meta(name: str, where: Path, **arguments) -> nn.Module:
    """Return timm's model of this name without memory for its weights.

    Args:
        name: of timm's registry, or 'local-dir:FOLDER' with timm's config.json in it.
        where: the file that names it, for messages.

    Raises:
        UserError: timm is not installed, or cannot build it.
    """
    import torch

    try:
        import timm
    except ImportError:
        raise UserError(f"{where} names a model of timm, which is not installed: pip install timm") from None
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # whatever an unknown name or argument comes to inside timm
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: timm cannot build its model: {reason}") from None


def describe_vit(
    model: nn.Module, where: Path, size: tuple[int, int] | None = None
) -> tuple[ImageTowerConfig, tuple[int, int]]:
    """Return our options for a ViT of timm, its classifier left aside, and the (height, width) of its images in pixels.

    The options hold the height alone, as far as patches fill it; `set_input_size` makes a tower of oblong images.

    Args:
        size: (height, width) of the images, where it is not the model's own.

    Raises:
        UserError: it has parts that our tower has not; all of them are named.
    """
    _refuse(_strange_parts(model), where)
    size = tuple(size or model.patch_embed.img_size)
    _refuse(_strange_options(model, size), where)
    block, patch = model.blocks[0], model.patch_embed.patch_size[0]
    pool = model.global_pool
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
        patch_bias=model.patch_embed.proj.bias is not None,
        activation=_activation(block.mlp.act),
        norm_eps=next(module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)),
        patch_dropout=getattr(model.patch_drop, "prob", 0.0),
    )
    return config, size


def _refuse(problems: list[str], where: Path) -> None:
    if problems:
        raise UserError(f"{where}: our ViT has no {', no '.join(problems)}; timm itself can load this model")


def _strange_parts(model: nn.Module) -> list[str]:
    """Modules of other kinds than our tower's; the options of a model that has none can be read off."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        return [f"'{type(model).__name__}'"]
    problems = (
        [] if type(model.patch_embed) is PatchEmbed else [f"patch embedding '{type(model.patch_embed).__name__}'"]
    )
    for block in model.blocks:
        if type(block) is not Block:
            return [*problems, f"block '{type(block).__name__}'"]
    for part, kind in ((model.blocks[0].attn, Attention), (model.blocks[0].mlp, Mlp)):
        if type(part) is not kind:
            problems.append(f"{kind.__name__.lower()} '{type(part).__name__}'")
    if not all(isinstance(block.norm1, nn.LayerNorm) for block in model.blocks):
        problems.append(f"norm '{type(model.blocks[0].norm1).__name__}'")
    return problems


def _strange_options(model: nn.Module, size: tuple[int, int]) -> list[str]:
    block, pool = model.blocks[0], model.global_pool
    patch = model.patch_embed.patch_size
    fc_norm = not isinstance(model.fc_norm, nn.Identity)
    takes_prefix = model.pool_include_prefix if pool == "map" else not model.pool_include_prefix
    found = {
        f"{model.in_chans} input channels": model.in_chans != 3,
        f"oblong patches {patch}": patch[0] != patch[1],
        "norm of the patch embedding (embed_norm_layer)": not isinstance(model.patch_embed.norm, nn.Identity),
        f"register tokens (reg_tokens={model.num_reg_tokens})": model.num_reg_tokens > 0,
        "model without position embedding (pos_embed='none')": model.pos_embed is None,
        "norm of queries and keys (qk_norm)": not isinstance(block.attn.q_norm, nn.Identity),
        "norm inside attention (scale_attn_norm)": not isinstance(block.attn.norm, nn.Identity),
        "norm inside the MLP (scale_mlp_norm)": not isinstance(block.mlp.norm, nn.Identity),
        f"padding of images that patches do not fill (dynamic_img_pad, {size[0]}×{size[1]} pixels)": (
            model.patch_embed.dynamic_img_pad and any(side % patch[0] for side in size)
        ),
        f"activation '{type(block.mlp.act).__name__}'": _activation(block.mlp.act) is None,
        f"pooling global_pool='{pool}'": pool not in (*POOLS, ""),
        "norm behind the pooling (fc_norm)": fc_norm,  # its tokens have no norm, those of our towers have
        "model without a final norm (final_norm=False)": isinstance(model.norm, nn.Identity) and not fc_norm,
        f"such treatment of the class token in pooling (pool_include_prefix={model.pool_include_prefix})": (
            pool in ("map", "avg") and model.num_prefix_tokens > 0 and not takes_prefix
        ),
    }
    return [name for name, is_so in found.items() if is_so]


def _activation(module: nn.Module) -> str | None:
    """Return our name of an activation of timm, None for one that we have not."""
    name = type(module).__name__
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return "gelu"
    if name == "GELUTanh" or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_tanh"
    return {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(name)


def timm_problems(config: ImageTowerConfig) -> list[str]:
    """Return the options that timm's ViT cannot express, each with what to do."""
    problems = []
    if config.norm_eps not in BASES:
        known = " or ".join(map(str, BASES))
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
    base = BASES[config.norm_eps][config.pool != "attention"]
    return base, {
        "img_size": list(size),
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


def timm_description(name: str, arguments: dict, num_classes: int, transform: dict) -> dict:
    """Return timm's config.json."""
    return {
        "architecture": name,
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **transform,
        },
    }


def _registered_name(config: ImageTowerConfig, size: tuple[int, int]) -> str | None:
    """Return the name in timm's registry whose model has exactly this architecture and input size, or None."""
    import timm

    if size[0] != size[1]:
        return None
    # The keys tell of LayerScale, missing biases and the like, which can be read but not written.
    keys = {entry.theirs for entry in timm_table(timm_names(config))}
    kind = "siglip" if config.pool == "attention" else "siglip_gap" if not config.class_token else "clip*"
    for pattern in (f"vit_*_patch{config.patch_size}_{kind}_{size[0]}", f"vit_*_patch{config.patch_size}_{size[0]}"):
        for name in timm.list_models(pattern):
            if _is(name, config, size, keys):
                return name
    return None


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Return the factor for which int(width · factor), as both libraries compute it, is mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _is(name: str, config: ImageTowerConfig, size: tuple[int, int], keys: set[str]) -> bool:
    model = build_on_meta(name, Path(name), num_classes=0)
    try:
        found, taken = describe_vit(model, Path(name))
    except UserError:  # a ViT of another kind
        return False
    same = _comparable(found) == _comparable(config) and tuple(taken) == tuple(size)
    return same and keys == model.state_dict().keys() and not model.no_embed_class


def _comparable(config: ImageTowerConfig) -> tuple:
    """What has to agree: neither how a tower is trained nor where its positions come from."""
    names = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "pool", "class_token", "pre_norm")
    # Without pre_norm timm's patches have a bias, which can be zero.
    return tuple(getattr(config, name) for name in (*names, "activation", "norm_eps"))
