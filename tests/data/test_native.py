"""Native images: the grids and pixels of transformers' Siglip2 processor and of timm, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.preprocess import Preprocess, PreprocessConfig, native_grid
from contrastive.data.record import BadSample
from contrastive.errors import UserError
from contrastive.patches import Patches

SIZES = [(64, 512), (512, 64), (100, 100), (37, 91), (480, 640), (1, 1), (3, 700), (700, 5), (225, 224), (16, 4096)]


def options(**more) -> PreprocessConfig:
    return PreprocessConfig(224, 16, resize="native", **{"interpolation": "bilinear", **more})


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


@pytest.mark.parametrize("most", [1, 7, 64, 196, 256, 1024])
def test_grids_are_those_of_transformers_and_timm(most):
    from timm.data.naflex_transforms import get_image_size_for_seq
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    rng = np.random.default_rng(most)
    sizes = [*SIZES, *np.exp(rng.uniform(0, 8, (40, 2))).astype(int).tolist()]
    for height, width in sizes:
        rows, columns = native_grid(height, width, 16, most)
        assert (16 * rows, 16 * columns) == get_image_size_for_max_num_patches(height, width, 16, most)
        assert 1 <= rows * columns <= most
        if (height, width) not in [(1, 1)]:  # which timm refuses
            assert (16 * rows, 16 * columns) == get_image_size_for_seq((height, width), 16, most)[1]


def test_pixels_are_those_of_transformers():
    from transformers import Siglip2ImageProcessor

    images = [image for image in pictures() if max(image.size) <= 256 * min(image.size)]
    theirs = Siglip2ImageProcessor(max_num_patches=256)(images, return_tensors="pt")
    ours = Preprocess(options(patches=256))(images, return_tensors="pt")
    assert torch.equal(ours["spatial_shapes"], theirs["spatial_shapes"])
    most = ours.pixel_values.shape[1]
    assert torch.equal(ours["pixel_attention_mask"], theirs["pixel_attention_mask"][:, :most])
    assert not theirs["pixel_attention_mask"][:, most:].any()
    own = ours["pixel_attention_mask"].bool()
    torch.testing.assert_close(ours.pixel_values[own], theirs["pixel_values"][:, :most][own], rtol=0, atol=1e-6)


def test_one_image_and_several():
    preprocess, images = Preprocess(options()), pictures()[2:5]
    one, all_of_them = preprocess(images[0]), preprocess(images)
    assert isinstance(one, Patches) and one.values.shape == (196, 768) and one.grids.tolist() == [14, 14]
    assert len(all_of_them) == 3 and torch.equal(all_of_them[0].values[:196], one.values)
    # Normalised as pixels are: a patch put together is the part of the picture.
    square = Preprocess(PreprocessConfig(224, interpolation="bilinear"))
    torch.testing.assert_close(one.pixels(), square(images[0]), rtol=0, atol=0)
    assert preprocess.collate([]).values.shape == (0, 0, 768) and len(preprocess.collate([])) == 0


def test_what_cannot_be_is_said():
    with pytest.raises(BadSample, match="too_thin"):
        Preprocess(options(patches=256)).pixels(np.zeros((1, 4000, 3), np.uint8))
    assert len(Preprocess(options(patches=256)).pixels(np.zeros((1, 256, 3), np.uint8)).values) == 256
    with pytest.raises(UserError, match="patch_size that divides"):
        PreprocessConfig(224, resize="native")
    with pytest.raises(UserError, match="patch_size that divides image size 225"):
        PreprocessConfig(225, 16, resize="native")
    with pytest.raises(UserError, match="preprocess patches 20000: an image has 1 to 16,384"):
        options(patches=20_000)
    with pytest.raises(UserError, match="patch_size and patches are for resize 'native'"):
        PreprocessConfig(224, patches=5)
    with pytest.raises(UserError, match="cuts nothing"):
        options(short_side=256)
