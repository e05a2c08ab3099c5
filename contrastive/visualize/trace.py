"""One pass through the image tower that keeps what the pictures are made from. B batch, N tokens, D width."""

from dataclasses import dataclass

import torch

from contrastive.models.image_tower import ImageTower


@dataclass(frozen=True)
class Trace:
    """What went through a tower."""

    inputs: tuple[torch.Tensor, ...]
    """Of each block, what enters it: (B, N, D)."""
    tokens: torch.Tensor
    """(B, N, D) after the last block and the final norm."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    num_prefix: int
    """Tokens before the patches: 1 with a class token, else 0."""

    @property
    def patch_tokens(self) -> torch.Tensor:
        """(B, P, D): `tokens` without the class token."""
        return self.tokens[:, self.num_prefix :]

    def on_grid(self, values: torch.Tensor) -> torch.Tensor:
        """One value a token, (..., N), to the patches' values in their places: (..., rows, columns)."""
        return values[..., self.num_prefix :].unflatten(-1, self.grid)


@torch.no_grad()
def trace(tower: ImageTower, pixels: torch.Tensor) -> Trace:
    """Send normalised pixels (B, 3, H, W) through a tower in eval mode.

    `tokens` equals `tower.forward_features(pixels)`.
    """
    patch, depth = tower.config.patch_size, len(tower.transformer.blocks)
    states = tower.states(pixels, range(depth + 1))
    return Trace(
        inputs=tuple(states[number] for number in range(depth)),
        tokens=tower.norm(states[depth]),
        grid=(pixels.shape[-2] // patch, pixels.shape[-1] // patch),
        num_prefix=tower.num_prefix_tokens,
    )
