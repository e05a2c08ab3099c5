"""timm's description of a model, and what it is in our options.

Hyper-parameters of a name live in timm's code alone. They are read off a model that timm builds on the meta device:
it has shapes and no memory.
"""

from pathlib import Path

from torch import nn

from contrastive.errors import UserError
from contrastive.log import warn
from contrastive.models import ImageTowerConfig

POOLS = {"token": "class", "avg": "average", "map": "attention"}
THEIR_POOLS = {ours: theirs for theirs, ours in POOLS.items()}


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


def describe(
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


def whole_patches(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the pixels that patches fill: timm and open_clip pass over what is beyond, on the right and below."""
    return size[0] // patch * patch, size[1] // patch * patch


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
