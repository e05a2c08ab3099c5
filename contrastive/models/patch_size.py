"""The patch embedding for patches of another size (Beyer et al. 2023, "FlexiViT", section 3.4)."""

from dataclasses import replace

import torch

from contrastive.models.image_tower import ImageTrunk, PatchEmbedding
from contrastive.models.positions import resampling


def resample_patch_embedding(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Return the weights (D, 3, P, P), P a patch's side in pixels, for another side, (D, 3, P', P').

    They give a patch enlarged to P' (bilinear) what the old ones give it as it is; of patches made smaller what comes
    nearest: the pseudo-inverse of the resizing, as timm's `resample_patch_embed`.
    """
    side = torch.linalg.pinv(resampling(weight.shape[-1], patch_size, weight.device, "bilinear").double().T)
    return torch.einsum("ij,kl,dcjl->dcik", side, side, weight.double()).to(weight.dtype)


@torch.no_grad()
def set_patch_size(tower: ImageTrunk, patch_size: int, image_size: int) -> None:
    """Give a tower patches of another side, and positions for images of `image_size` pixels in such patches.

    Its parameters for both are new ones.

    Raises:
        UserError: the image size is no multiple of it.
    """
    old, options = tower.patch_embed, tower.architecture
    new = PatchEmbedding(3, options.width, patch_size, patch_size, bias=options.patch_bias).to(old.weight)
    new.weight.copy_(resample_patch_embedding(old.weight, patch_size))
    if old.bias is not None:
        new.bias.copy_(old.bias)
    new.grid_size = old.grid_size
    tower.patch_embed, tower.architecture = new, replace(options, patch_size=patch_size)
    tower.set_input_size(image_size)
