"""What timm's NaFlexVit, its ViT of images of any shape, has otherwise than its plain ViT; `timm_vit` does the rest.

P is the side of a patch in pixels, h and w rows and columns of positions, D the width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from contrastive.interop.formats.state_dicts import patch_convolution, patch_linear
from contrastive.models.patch_embedding import Places
from contrastive.patches import Patches

RENAMES = ((r"^patch_embed\.", "embeds."), (r"^pos_embed", "embeds.pos_embed"), (r"^cls_token", "embeds.cls_token"))
"""From the names of timm's plain ViT to those of its NaFlexVit."""
UNIT_AXES = {"embeds.pos_embed": 1, "embeds.cls_token": 2}
BASE = "naflexvit_base_patch16_siglip"
"""The name of timm's that is a model of ours, of any shape by arguments; its LayerNorms have an epsilon of 1e-6."""


def is_naflex(model: nn.Module) -> bool:
    """Whether a model of timm is a NaFlexVit."""
    return type(model).__name__ == "NaFlexVit"


def position_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) in pixels of an image with as many patches as there are positions; learned ones."""
    if model.embeds.pos_embed is None:
        return model.embeds.patch_size
    return tuple(n * side for n, side in zip(model.embeds.pos_embed.shape[1:3], model.embeds.patch_size, strict=True))


def strange_naflex(model: nn.Module) -> dict[str, bool]:
    """What its embedding and its pooling may have that ours has not, by name."""
    embeds, block, pool = model.embeds, model.blocks[0], model.attn_pool
    height, width = position_size(model)
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


def as_vit(file: Mapping[str, torch.Tensor], prefix: str, patch_size: int) -> dict[str, torch.Tensor]:
    """Return its tensors in the shapes of a plain ViT: Linear (D, P·P·3) to (D, 3, P, P), (1, h, w, D) to (1, h·w, D).

    Args:
        prefix: what stands before each name.
    """
    made, weight, position = dict(file), f"{prefix}embeds.proj.weight", f"{prefix}embeds.pos_embed"
    if weight in made:
        made[weight] = patch_convolution(made[weight], patch_size)
    if position in made and made[position].ndim == 4:
        made[position] = made[position].flatten(1, 2)
    return made


def from_vit(file: Mapping[str, torch.Tensor], prefix: str, grid_size: int) -> dict[str, torch.Tensor]:
    """Return tensors of a plain ViT, by this one's names, in its shapes; a class token takes its position along."""
    weight, position, token = (f"{prefix}embeds.{name}" for name in ("proj.weight", "pos_embed", "cls_token"))
    made = {**file, weight: patch_linear(file[weight])}
    if token in file:
        made[token] = file[token] + file[position][:, :1]
    made[position] = file[position][:, -(grid_size**2) :].unflatten(1, (grid_size, grid_size)).contiguous()
    return made


def naflex_inputs(images: Patches) -> dict[str, torch.Tensor]:
    """Return images as its `forward` takes them, by name."""
    places = Places.of(images.grids[:, None], torch.arange(images.values.shape[1]))
    coordinates = torch.stack([places.row, places.column], dim=-1)
    coordinates = torch.where(images.mask[..., None], coordinates, 0)  # the largest is taken for the image's own
    return {"patches": images.values, "patch_coord": coordinates, "patch_valid": images.mask}


def naflex_pixels(made: Sequence[Mapping[str, torch.Tensor]]) -> Patches:
    """Return what its transform makes of each image, {'patches': (N, P·P·3), 'patch_coord': (N, 2)}, as a batch."""
    return Patches.batch([Patches(one["patches"], one["patch_coord"].amax(dim=0) + 1) for one in made])
