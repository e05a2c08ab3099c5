import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.augment import AugmentConfig, _draw_crop, augment
from contrastive.data.order import philox
from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError


def photo(height, width):
    """Smooth structure with some noise on it, like a photograph."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


SIZES = [(375, 500), (500, 333), (100, 101), (64, 300), (224, 224), (97, 41)]


def generator(position, seed=0):
    return np.random.Generator(philox(seed, position, 1))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [64, 224])
def test_squash_is_pillows_resize(height, width, size):
    image = photo(height, width)
    result = Preprocess(PreprocessConfig(size, "squash")).pixels(image).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(result - expected)
    # Of two passes, Pillow takes the vertical one first for tall images, and rounds between them.
    mean, largest = (0.3, 4) if height > 1.4 * width else (0.02, 1)
    assert difference.mean() < mean and difference.max() <= largest, (difference.mean(), difference.max())


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [64, 224])
def test_crop_is_open_clips_evaluation_transform(height, width, size):
    from open_clip.transform import image_transform

    image = photo(height, width)
    preprocess = Preprocess(PreprocessConfig(size, "crop", CLIP_MEAN, CLIP_STD))
    theirs = image_transform(size, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(image)
    ours = preprocess(image)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    steps = (ours - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255  # in steps of a uint8 pixel
    assert steps.mean() < 0.02 and steps.max() < 2.01, (steps.mean(), steps.max())


def test_bytes_image_and_array_give_the_same_pixels():
    image = photo(120, 160)
    file = io.BytesIO()
    image.save(file, "PNG")
    preprocess = Preprocess(PreprocessConfig(32))
    first = preprocess.pixels(image)
    assert torch.equal(preprocess.pixels(file.getvalue()), first)
    assert torch.equal(preprocess.pixels(np.array(image)), first)


def test_normalize_is_the_formula_and_leaves_its_input():
    config = PreprocessConfig(4, "squash", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (batch.double() / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    result = Preprocess(config).normalize(batch)
    assert result.dtype == torch.float32 and torch.allclose(result.double(), expected, atol=1e-6)
    floats = batch.float()
    Preprocess(config).normalize(floats)
    assert torch.equal(floats, batch.float())


def test_siglip_range_and_pickling():
    preprocess = pickle.loads(pickle.dumps(Preprocess(PreprocessConfig(2))))
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2).expand(3, 1, 2)
    assert preprocess.normalize(black_and_white)[0, 0].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("options", [{"image_size": 0}, {"resize": "stretch"}, {"std": (1.0, 0.0, 1.0)}])
def test_bad_preprocess_options(options):
    with pytest.raises(UserError):
        PreprocessConfig(**options)


def coordinates(height, width):
    """An image whose red and green tell where a pixel came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return torch.from_numpy(np.stack([rows, columns, rows * 0]).astype(np.uint8))


def test_no_augmentation_returns_the_image_itself():
    image = coordinates(48, 48)
    off = AugmentConfig(crop_scale=(1, 1))
    assert augment(image, 48, off, generator(0)).data_ptr() == image.data_ptr()


def test_crop_obeys_scale_and_ratio():
    config = AugmentConfig(crop_scale=(0.3, 0.6), crop_ratio=(0.8, 1.25))
    scales, ratios, tops = [], [], []
    for position in range(300):
        crop = augment(coordinates(200, 200), 200, config, generator(position))
        # Where the first and last pixel came from tells the box; resizing blurs that by about a pixel.
        top, bottom = crop[0].min().item(), crop[0].max().item() + 1
        left, right = crop[1].min().item(), crop[1].max().item() + 1
        scales.append((bottom - top) * (right - left) / 200**2)
        ratios.append((right - left) / (bottom - top))
        tops.append(top / max(1, 200 - (bottom - top)))
    assert 0.28 < min(scales) < 0.34 and 0.56 < max(scales) < 0.62
    assert 0.78 < min(ratios) < 0.84 and 1.19 < max(ratios) < 1.28
    assert abs(np.mean(scales) - 0.45) < 0.02, "scale is not uniform"
    assert abs(np.mean(np.log(ratios))) < 0.03, "ratio is not log-uniform"
    assert abs(np.mean(tops) - 0.5) < 0.06 and min(tops) < 0.05 and max(tops) > 0.95


def test_crop_that_cannot_fit_is_the_largest_centred_one():
    image = coordinates(40, 250)  # ratio 6.25, far above 4/3, and 90 % of the area never fits
    crop = augment(image, 40, AugmentConfig(crop_ratio=(0.75, 4 / 3)), generator(0))
    width = round(40 * 4 / 3)
    left = (250 - width) // 2
    assert crop[1].min() in (left, left + 1) and crop[1].max() in (left + width - 2, left + width - 1)
    assert crop[0].min() <= 1 and crop[0].max() >= 38


def test_crop_cut_first_equals_crop_of_numpy():
    """The pixels are those of Pillow's resize of the cut-out region alone."""
    image = photo(150, 200)
    config, rng = AugmentConfig(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0)), generator(7)
    result = augment(torch.from_numpy(np.array(image)).permute(2, 0, 1), 64, config, rng)
    u_top, u_left = generator(7).random((10, 4))[0, 2:]
    side = round(math.sqrt(150 * 200 * 0.5))
    top, left = int(u_top * (150 - side + 1)), int(u_left * (200 - side + 1))
    expected = np.asarray(image.crop((left, top, left + side, top + side)).resize((64, 64), 3))
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_draws_come_from_the_generator_alone():
    image, config = coordinates(60, 80), AugmentConfig(crop_scale=(0.2, 0.9), flip=True)
    torch.manual_seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (augment(image, 32, config, generator(position)) for position in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


def test_flip_mirrors_half_of_the_images():
    image = coordinates(8, 8)
    config = AugmentConfig(crop_scale=(1.0, 1.0), flip=True)
    results = [augment(image, 8, config, generator(position)) for position in range(400)]
    mirrored = sum(torch.equal(result, image.flip(2)) for result in results)
    assert mirrored + sum(torch.equal(result, image) for result in results) == 400
    assert 150 < mirrored < 250


@pytest.mark.parametrize("ratio", [(0.75, 1.3333), (0.3, 1.0), (1.0, 2.0)])
def test_min_side_never_lets_a_crop_be_enlarged(ratio):
    config = AugmentConfig(crop_scale=(0.3, 1.0), crop_ratio=ratio)
    side = config.min_side(64)
    for height, width in ((side, side), (side, side + 60), (side + 60, side)):
        for position in range(200):
            rng = generator(position)
            _, _, crop_height, crop_width = _draw_crop(height, width, config, rng)
            assert min(crop_height, crop_width) >= 63


@pytest.mark.parametrize(
    "options", [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"crop_ratio": (2.0, 1.0)}]
)
def test_bad_augment_options(options):
    with pytest.raises(UserError):
        AugmentConfig(**options)
