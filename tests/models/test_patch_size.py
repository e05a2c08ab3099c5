"""Patches of another size: an enlarged patch is embedded as it was before (FlexiViT)."""

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.patch_embedding import resample_patch_embedding


@pytest.mark.parametrize("size", [4, 5, 8, 16])
def test_an_enlarged_patch_is_embedded_as_before(size):
    generator = torch.Generator().manual_seed(0)
    weight, patch = (torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=generator) for n in (6, 5))
    larger = interpolate(patch, size=(size, size), mode="bilinear", align_corners=False)
    found = conv2d(larger, resample_patch_embedding(weight, size))
    torch.testing.assert_close(found, conv2d(patch, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [3, 7, 24])
def test_it_is_timms(size):
    from timm.layers.patch_embed import resample_patch_embed

    weight = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    theirs = resample_patch_embed(weight, [size, size], interpolation="bilinear", antialias=True)
    torch.testing.assert_close(resample_patch_embedding(weight, size), theirs, rtol=0, atol=2e-5)


def test_a_tower_of_enlarged_patches_embeds_the_enlarged_image_alike():
    shape = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    torch.manual_seed(0)
    tower = ImageTower(ImageTowerConfig(**shape), 8).eval()
    torch.nn.init.normal_(tower.position_embedding)
    pixels = torch.randn(2, 3, 16, 16).unflatten(2, (4, 4)).unflatten(4, (4, 4)).transpose(3, 4)  # (B, 3, 4, 4, 4, 4)
    image = pixels.transpose(3, 4).reshape(2, 3, 16, 16)
    each = interpolate(pixels.flatten(0, 3)[:, None], size=(8, 8), mode="bilinear", align_corners=False)
    larger = each[:, 0].unflatten(0, (2, 3, 4, 4)).transpose(3, 4).reshape(2, 3, 32, 32)
    before = tower(image)
    tower.set_patch_size(8, 32)  # as many patches: the positions stay
    assert (tower.config.patch_size, tower.config.image_size, tower.grid) == (8, 32, (4, 4))
    torch.testing.assert_close(tower(larger), before, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiple of the patch size 5"):
        tower.set_patch_size(5, 32)
