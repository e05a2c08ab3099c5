import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError


def photo(height, width):
    """Smooth structure with some noise on it, like a photograph."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


SIZES = [(375, 500), (500, 333), (100, 101), (64, 300), (224, 224), (97, 41)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [64, 224])
def test_squash_is_pillows_resize(height, width, size):
    image = photo(height, width)
    result = Preprocess(PreprocessConfig(size)).pixels(image).permute(1, 2, 0).numpy().astype(int)
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
    preprocess = Preprocess(PreprocessConfig(size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD))
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
    config = PreprocessConfig(4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
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


@pytest.mark.parametrize(("cut", "top"), [("round", (0, 2, 2, 4)), ("floor", (0, 1, 2, 3)), ("corner", (0, 0, 0, 0))])
def test_the_square_is_cut_where_asked(cut, top):
    """Margins of 1, 3, 4 and 7: half a pixel goes to the even one, or down."""
    for margin, expected in zip((1, 3, 4, 7), top, strict=True):
        rows = torch.arange(8 + margin, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 8, 3).contiguous().numpy()
        pixels = Preprocess(PreprocessConfig(8, resize="crop", cut=cut)).pixels(rows)
        assert pixels[0, :, 0].tolist() == list(range(expected, expected + 8))


def test_squash_to_more_than_is_kept():
    image = photo(50, 70)
    whole = Preprocess(PreprocessConfig(20)).pixels(image)
    for cut, start in (("floor", 1), ("round", 2), ("corner", 0)):
        kept = Preprocess(PreprocessConfig(17, short_side=20, cut=cut)).pixels(image)
        assert torch.equal(kept, whole[:, start : start + 17, start : start + 17])


@pytest.mark.parametrize("options", [{"cut": "left"}, {"short_side": 100}, {"image_size": (8, 9), "short_side": 10}])
def test_cuts_that_cannot_be(options):
    with pytest.raises(UserError):
        PreprocessConfig(**options)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"resize": "stretch"}, {"std": (1.0, 0.0, 1.0)}])
def test_bad_preprocess_options(options):
    with pytest.raises(UserError):
        PreprocessConfig(**options)


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("values", [(0.5,), (0.1, 0.2), (0.1, 0.2, 0.3, 0.4)])
def test_one_number_for_each_channel(name, values):
    with pytest.raises(UserError, match=f"preprocess {name} .* has to be three numbers"):
        PreprocessConfig(**{name: values})
