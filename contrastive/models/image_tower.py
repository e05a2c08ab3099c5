"""The image tower: a Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.errors import UserError
from contrastive.models.packing import Packing
from contrastive.models.patch_embedding import (
    PatchEmbedding,
    Places,
    interpolate_position_embedding,
    sincos_position_embedding,
)
from contrastive.models.transformer import MOST, AttentionPooling, Extent, Transformer, TransformerConfig
from contrastive.option_types import Positive, Probability
from contrastive.patches import Patches


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig(TransformerConfig):
    """Options of the ViT. The defaults are SigLIP's B/16 at 224 pixels."""

    SECTION = "model.image"

    image_size: Positive[int] = 224
    """Height and width of the input in pixels."""
    patch_size: Positive[int] = 16
    """Height and width of a patch in pixels; must divide image_size."""
    pool: Literal["class", "average", "attention"] = "attention"
    """How tokens become one vector: the class token, their mean, or SigLIP's attention head (MAP)."""
    position: Literal["learned", "sincos"] = "learned"
    """Learned position embeddings, or fixed two-dimensional sin-cos ones."""
    class_token: bool = False
    """Prepend a learned class token; pool=class needs it."""
    pre_norm: bool = False
    """LayerNorm before the first block, as in CLIP."""
    patch_bias: bool = True
    """Bias in the patch embedding; CLIP has none."""
    projection: bool = False
    """Linear projection (no bias) to embed_dim after pooling, as in CLIP; without it width must equal embed_dim."""
    patch_dropout: Probability[float] = 0.0
    """Share of patches dropped in training (FLIP); 0.5 halves the tower's work."""
    native: bool = False
    """Take images in their own aspect, as any number of patches (SigLIP 2's NaFlex). The positions are those of a
    square of image_size, resampled for each image (bilinear, antialiased)."""

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    def nearest_sizes(self, size: int) -> str:
        """Return the multiples of the patch size on both sides of a size in pixels, for an error: '32 or 48'."""
        below = max(size - size % self.patch_size, self.patch_size)
        return f"{below} or {below + self.patch_size}"

    def check(self) -> None:
        """Raise UserError when the options contradict each other."""
        super().check()
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image.image_size {self.image_size} is not a multiple of model.image.patch_size "
                f"{self.patch_size}; use {self.nearest_sizes(self.image_size)}, or another patch size"
            )
        if self.pool == "class" and not self.class_token:
            raise UserError("model.image.pool 'class' needs model.image.class_token true")
        if self.position == "sincos" and self.width % 4:
            raise UserError(f"model.image.position 'sincos' needs a width divisible by 4, not {self.width}")
        if self.native and self.patch_dropout:
            raise UserError(
                "model.image.patch_dropout is not for native images; use fewer patches, data.native.patches"
            )


class Hidden(NamedTuple):
    """Patches that the tower is not to see, for masked prediction (Zhou et al. 2022, "iBOT")."""

    patches: torch.Tensor
    """Bool (B, N), the class token not counted."""
    token: torch.Tensor
    """(D,): what is in their place, before the positions are added."""


class ImageTrunk(nn.Module):
    """Pixels (B, 3, H, W), or with `native` also Patches, to the hidden states of a ViT, (B, N, D) each.

    Hidden state 0 is what enters the first block, k what leaves block k. The class token, where there is one, comes
    first. `architecture` holds the options; `patch_dropout` begins as theirs, and a curriculum changes it.

    packs: whether Patches are computed one image behind the other, without padding; else with a mask, to the same.
    """

    packs = True

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        config.check()
        self.architecture, self.patch_dropout = config, config.patch_dropout
        width = config.width
        self.patch_embed = PatchEmbedding(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.patch_embed.grid_size = (config.grid_size, config.grid_size)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        if config.position == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(config.num_patches + config.class_token, width))
        else:
            self.register_buffer("position_embedding", self._fixed_positions(), persistent=False)
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.transformer = Transformer(config)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the positions are made for."""
        return self.patch_embed.grid_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.architecture.class_token)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the positions are made for."""
        return self.grid[0] * self.architecture.patch_size, self.grid[1] * self.architecture.patch_size

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resample the positions once, for images of another size in pixels: a side, or (height, width).

        Learned positions are interpolated from those at hand (antialiased; bicubic, of a native tower bilinear), fixed
        ones computed anew. The position parameter is a new one: call this before an optimizer or DDP takes hold of the
        parameters. A square size also becomes `architecture.image_size`.

        Raises:
            UserError: a side is not a multiple of the patch size.
        """
        height, width = (operator.index(side) for side in (size if isinstance(size, (tuple, list)) else (size, size)))
        patch = self.architecture.patch_size
        for side in (height, width):
            if side > MOST["image_size"]:
                raise UserError(f"input size {height}×{width} is beyond {MOST['image_size']} pixels, the most a side")
            if side < 1 or side % patch:
                raise UserError(
                    f"input size {height}×{width}: {side} is not a multiple of the patch size {patch}; "
                    f"use {self.architecture.nearest_sizes(side)}"
                )
        grid = (height // patch, width // patch)
        old, self.patch_embed.grid_size = self.grid, grid
        if height == width:
            self.architecture = replace(self.architecture, image_size=height)
        if grid == old:
            return
        now = self.position_embedding
        if self.architecture.position == "learned":
            prefix, patches = now.detach().tensor_split([self.num_prefix_tokens])
            resampled = torch.cat([prefix, interpolate_position_embedding(patches, old, grid, self._resampling_mode)])
            self.position_embedding = nn.Parameter(resampled, requires_grad=now.requires_grad)
        else:
            self.position_embedding = self._fixed_positions().to(now)

    def embed_patches(self, pixels: torch.Tensor, hidden: Hidden | None = None) -> torch.Tensor:
        """(B, 3, H, W) to patch tokens with positions, (B, N, D), class token first when there is one.

        An input of another size than `input_size` gets the positions that `set_input_size` would make. H and W must
        be multiples of the patch size (UserError). With `hidden` no patch is dropped.
        """
        patch = self.architecture.patch_size
        if pixels.shape[-2] % patch or pixels.shape[-1] % patch:
            raise UserError(f"image of {tuple(pixels.shape[-2:])} pixels: both must be multiples of {patch}")
        x = self.patch_embed(pixels)
        grid = (x.shape[-2], x.shape[-1])
        # (B, N, D), laid out so: else the blocks' sums keep the convolution's layout, and every LayerNorm copies them.
        x = x.flatten(2).transpose(1, 2).contiguous()
        if hidden is not None:
            x = torch.where(hidden.patches[..., None], hidden.token.to(x.dtype), x)
        prefix, patches = self.position_embedding.tensor_split([self.num_prefix_tokens])
        if self.architecture.position == "learned" or self.architecture.native:
            patches = interpolate_position_embedding(patches, self.grid, grid, self._resampling_mode)
        elif grid != self.grid:
            patches = sincos_position_embedding(*grid, self.architecture.width).to(self.position_embedding)
        # Under autocast the sum is float32, and so is what the blocks add to: bfloat16 would round it at every block.
        x = x + patches
        if self.training and self.patch_dropout > 0 and hidden is None:
            x = drop_patches(x, self.patch_dropout)
        if self.class_token is not None:
            class_token = (self.class_token + prefix[0]).expand(x.shape[0], 1, -1)
            x = torch.cat([class_token, x], dim=1)
        return x

    def embed(self, pixels: torch.Tensor, hidden: Hidden | None = None) -> torch.Tensor:
        """(B, 3, H, W) to hidden state 0, (B, N, D): after positions and, where there is one, `pre_norm`."""
        x = self.embed_patches(pixels, hidden)
        return x if self.pre_norm is None else self.pre_norm(x)

    def embed_native(self, images: Patches) -> tuple[torch.Tensor, Extent, Packing | None]:
        """Patches to hidden state 0, what attention stays within, and how they are packed, (T, D).

        Where `packs` is off, and in an export, they are padded, (B, N, D), and None is the packing.

        Raises:
            UserError: the tower is not native, or its patches are of another size, or not normalised.
        """
        if not self.architecture.native:
            raise UserError("Patches are for towers with model.image.native; this one takes pixels (B, 3, H, W)")
        images.check(self.architecture.patch_size)
        images, embed = images.cut(), self.patch_embed
        packed = self.packs and not torch.compiler.is_exporting()
        packing = Packing.of(images, self.num_prefix_tokens) if packed else None
        if packing is None:
            values, numbers = images.values, torch.arange(images.values.shape[1], device=images.values.device)
            places = Places.of(images.grids.to(numbers.device)[:, None], numbers)
        else:
            values, places = images.values.flatten(0, 1)[packing.patches], packing.places
        x = F.linear(values, embed.weight.permute(0, 2, 3, 1).flatten(1), embed.bias)
        prefix, patches = self.position_embedding.tensor_split([self.num_prefix_tokens])
        x = x + places.sample(patches, self.grid)
        if self.class_token is not None:
            class_token = (self.class_token + prefix[0]).to(x.dtype)
            if packing is None:
                x = torch.cat([class_token.expand(x.shape[0], 1, -1), x], dim=1)  # by len() an export would fix B
            else:
                x = torch.where(packing.prefix[:, None], class_token, x)
        x = x if self.pre_norm is None else self.pre_norm(x)
        if packing is not None:
            return x, packing.segments, packing
        return x, self.own_tokens(images)[:, None, None], None

    def states(self, pixels: torch.Tensor | Patches, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """The hidden states of these numbers, (B, N, D) each, none of them normalised by the final LayerNorm."""
        x, extent, packing = self._embedded(pixels)
        states = self.transformer.states(x, wanted, extent)
        return {number: self._unpacked(state, pixels, packing) for number, state in states.items()}

    def pool_tokens(self, x: torch.Tensor, pool: str, images: torch.Tensor | Patches | None = None) -> torch.Tensor:
        """(B, N, D) to (B, D); 'attention' needs the subclass's `head`. Padding of Patches, `images`, is left out."""
        prefix = self.num_prefix_tokens
        if pool == "class":
            return x[:, 0]
        own = self.own_tokens(images)
        if own is None:
            return self.head(x) if pool == "attention" else x[:, prefix:].mean(dim=1)
        if pool == "attention":
            return self.head(x, own[:, None, None])
        own = own[:, prefix:]
        return torch.where(own[..., None], x[:, prefix:], 0).sum(dim=1) / own.sum(dim=1, keepdim=True)

    def own_tokens(self, images: torch.Tensor | Patches | None) -> torch.Tensor | None:
        """Which tokens of Patches are an image's own, class token included: bool (B, N) as of `states`; else None."""
        if not isinstance(images, Patches):
            return None
        return F.pad(images.cut().mask, (self.num_prefix_tokens, 0), value=True)

    def _embedded(
        self, images: torch.Tensor | Patches, hidden: Hidden | None = None
    ) -> tuple[torch.Tensor, Extent, Packing | None]:
        """Pixels by `embed`, Patches by `embed_native`: to what the latter returns."""
        return self.embed_native(images) if isinstance(images, Patches) else (self.embed(images, hidden), None, None)

    def _unpacked(self, x: torch.Tensor, images: torch.Tensor | Patches, packing: Packing | None) -> torch.Tensor:
        """(B, N, D), of Patches N as in `images.cut()`, 0 where there is padding."""
        if packing is not None:
            return packing.unpacked(x, images.cut(), self.num_prefix_tokens)
        own = self.own_tokens(images)
        return x if own is None else torch.where(own[..., None], x, 0)

    @property
    def _resampling_mode(self) -> str:
        return "bilinear" if self.architecture.native else "bicubic"

    def _fixed_positions(self) -> torch.Tensor:
        fixed = sincos_position_embedding(*self.grid, self.architecture.width)
        return torch.cat([fixed.new_zeros(self.num_prefix_tokens, self.architecture.width), fixed])


class ImageTower(ImageTrunk):
    """ViT: pixels (B, 3, H, W) to one vector per image (B, E). E is embed_dim, D the width."""

    def __init__(self, config: ImageTowerConfig, embed_dim: int):
        super().__init__(config)
        if not config.projection and config.width != embed_dim:
            raise UserError(
                f"model.image.width {config.width} differs from model.embed_dim {embed_dim}: "
                "make them equal or set model.image.projection true"
            )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        if config.pool == "attention":
            self.head = AttentionPooling(config)
        self.projection = nn.Linear(config.width, embed_dim, bias=False) if config.projection else None

    @property
    def config(self) -> ImageTowerConfig:
        """The options; image_size is the one set last where that was square."""
        return self.architecture

    def set_patch_size(self, patch_size: int, image_size: int) -> None:
        """Take patches of another side, and images of `image_size` pixels in them; their parameters are new ones.

        Raises:
            UserError: the image size is no multiple of it.
        """
        self.patch_embed = self.patch_embed.resampled(patch_size)
        self.architecture = replace(self.architecture, patch_size=patch_size)
        self.set_input_size(image_size)

    def forward_features(self, pixels: torch.Tensor | Patches, hidden: Hidden | None = None) -> torch.Tensor:
        """Tokens after the last block and the final LayerNorm: (B, 3, H, W) to (B, N, D).

        Of Patches with N at most of an image's own; 0 follows those of the others.
        """
        x, extent, packing = self._embedded(pixels, hidden)
        return self._unpacked(self.norm(self.transformer(x, extent)), pixels, packing)

    def forward(self, pixels: torch.Tensor | Patches, project: bool = True) -> torch.Tensor:
        """(B, 3, H, W) normalised pixels, or Patches, to (B, E), not L2-normalised; to (B, D) with project=False."""
        x, extent, packing = self._embedded(pixels)
        x, pool = self.norm(self.transformer(x, extent)), self.architecture.pool
        if packing is None:
            return self.pooled(x, project, pixels)
        pooled = self.head(x, extent)[packing.order] if pool == "attention" else packing.pooled(x, pool)
        return self._projected(pooled, project)

    def pooled(
        self, tokens: torch.Tensor, project: bool = True, images: torch.Tensor | Patches | None = None
    ) -> torch.Tensor:
        """What `forward` makes of the tokens (B, N, D) that `forward_features` gives, of Patches with `images`."""
        return self._projected(self.pool_tokens(tokens, self.architecture.pool, images), project)

    def _projected(self, x: torch.Tensor, project: bool) -> torch.Tensor:
        return self.projection(x) if project and self.projection is not None else x


def drop_patches(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Keep a random subset of tokens per image: (B, N, D) to (B, max(1, round(N·(1 − rate))), D).

    Drawn on the tokens' own device. Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking".
    """
    num_keep = max(1, round(x.shape[1] * (1 - rate)))
    keep = torch.rand(x.shape[:2], device=x.device).topk(num_keep, dim=1).indices
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
