"""Options of the image tower."""

from dataclasses import dataclass
from typing import Literal

from contrastive.errors import UserError
from contrastive.models.attention import Activation


@dataclass(frozen=True)
class ImageTowerConfig:
    """Options of the ViT. The defaults are SigLIP's B/16 at 224 pixels."""

    image_size: int = 224
    """Height and width of the input in pixels."""
    patch_size: int = 16
    """Height and width of a patch in pixels; must divide image_size."""
    width: int = 768
    """Channels of every token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads; must divide width."""
    mlp_dim: int = 3072
    """Hidden channels of the MLP."""
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
    activation: Activation = "gelu_tanh"
    """Activation of the MLP."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    dropout: float = 0.0
    """Dropout probability after attention and MLP, and on attention weights."""
    patch_dropout: float = 0.0
    """Share of patches dropped in training (FLIP); 0.5 halves the tower's work."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    def check(self) -> None:
        """Raise UserError when the options contradict each other."""
        if self.image_size % self.patch_size:
            below = max(self.image_size - self.image_size % self.patch_size, self.patch_size)
            raise UserError(
                f"model.image.image_size {self.image_size} is not a multiple of model.image.patch_size "
                f"{self.patch_size}; use {below} or {below + self.patch_size}, or another patch size"
            )
        if self.width % self.num_heads:
            raise UserError(
                f"model.image.width {self.width} is not a multiple of model.image.num_heads {self.num_heads}"
            )
        if self.pool == "class" and not self.class_token:
            raise UserError("model.image.pool 'class' needs model.image.class_token true")
        if self.position == "sincos" and self.width % 4:
            raise UserError(f"model.image.position 'sincos' needs a width divisible by 4, not {self.width}")
