"""The random draws are checked by what they do to pictures that tell where each pixel came from."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from contrastive.data.augment import RAND_AUGMENT_OPS, AugmentConfig, apply_op, augment, jitter_color
from contrastive.data.decode import decode
from contrastive.data.order import philox
from contrastive.errors import UserError

WHOLE = {"crop_scale": (1.0, 1.0)}
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(30, 200, (7, 9, 3), dtype=np.uint8)).resize((64, 48), 3)
).copy()
EVERYTHING = {"rand_augment_ops": 2, "color_jitter": (0.4, 0.4, 0.4, 0.1), "gray_prob": 0.2}


def generator(position, seed=0):
    return np.random.Generator(philox(seed, position, 1))


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


def coordinates(height, width):
    """An image whose red and green tell where a pixel came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)


def test_no_augmentation_returns_the_image_itself():
    image = coordinates(48, 48)
    off = AugmentConfig(crop_scale=(1, 1))
    assert np.shares_memory(augment(image, 48, off, generator(0)).numpy(), image)


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
    image = Image.fromarray(PHOTO).resize((200, 150), 3)
    config, rng = AugmentConfig(crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0)), generator(7)
    result = augment(image, 64, config, rng)
    u_top, u_left = generator(7).random((10, 4))[0, 2:]
    side = round(math.sqrt(150 * 200 * 0.5))
    top, left = int(u_top * (150 - side + 1)), int(u_left * (200 - side + 1))
    expected = np.asarray(image.crop((left, top, left + side, top + side)).resize((64, 64), 3))
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_draws_come_from_the_generator_alone():
    image, config = coordinates(60, 80), AugmentConfig((0.2, 0.9), flip=True, **EVERYTHING)
    torch.manual_seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (augment(image, 32, config, generator(position)) for position in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


def test_flip_mirrors_half_of_the_images():
    image = coordinates(8, 8)
    config = AugmentConfig(crop_scale=(1.0, 1.0), flip=True)
    results = [augment(image, 8, config, generator(position)) for position in range(400)]
    mirrored = sum(torch.equal(result, as_tensor(image).flip(2)) for result in results)
    assert mirrored + sum(torch.equal(result, as_tensor(image)) for result in results) == 400
    assert 150 < mirrored < 250


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def large(height, width):
    return np.asarray(Image.fromarray(PHOTO).resize((width, height), 3))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_jpeg_shows_the_same_crop_as_the_whole(orientation, factor):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(large(480, 640), exif=exif)
    full = decode(data)
    for top, left, rows, columns in ((0, 0, 320, 400), (160, 80, 320, 400), (64, 72, 344, 320)):
        expected = full[:, top : top + rows, left : left + columns].float()
        expected = torch.nn.functional.avg_pool2d(expected, factor)
        result = decode(data, lambda h, w, box=(top, left, rows, columns): box, 320 // factor)
        assert result.shape == expected.shape and (result - expected).abs().mean() < 0.7
    # At any place the crop is that of the whole picture, to half a pixel of the reduced one.
    config, size = AugmentConfig(crop_scale=(0.1, 1.0), flip=True), 240 // factor
    array = np.ascontiguousarray(full.permute(1, 2, 0).numpy())
    for position in range(10):
        result, expected = (augment(image, size, config, generator(position)).float() for image in (data, array))
        assert (result - expected).abs().mean() < 0.55 * steepness(expected) + 0.7


def steepness(image):
    """The mean difference of neighbours."""
    return (image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean()).item()


def test_reduction_follows_the_crop_and_never_enlarges():
    data, sizes = jpeg(large(600, 800)), []
    for rows, columns in ((600, 800), (448, 500), (447, 800), (300, 224), (100, 800)):
        sizes.append(tuple(decode(data, lambda h, w, r=rows, c=columns: (h - r, w - c, r, c), 112).shape[1:]))
    assert sizes == [(150, 200), (112, 125), (224, 400), (150, 112), (100, 800)]
    assert decode(data, None, 75).shape == (3, 75, 100) and decode(data).shape == (3, 600, 800)


def test_pixels_are_those_of_the_whole_where_a_reduction_would_be_too_small():
    data, config = jpeg(large(100, 130)), AugmentConfig(**WHOLE)
    full = np.ascontiguousarray(decode(data).permute(1, 2, 0).numpy())
    assert torch.equal(augment(data, 51, config, generator(0)), augment(full, 51, config, generator(0)))
    assert not torch.equal(augment(data, 50, config, generator(0)), augment(full, 50, config, generator(0)))


def test_an_odd_size_keeps_the_crop_inside_the_reduced_picture():
    data = jpeg(large(202, 302))  # 101 x 151; halves of 3 and of 199 are both rounded up
    for top, left, rows, columns in ((0, 0, 202, 302), (3, 1, 199, 300), (1, 3, 201, 299)):
        kept = decode(data, lambda h, w, box=(top, left, rows, columns): box, 99)
        assert kept.shape == (3, round(rows / 2), round(columns / 2))


SPACE = v2.RandAugment._AUGMENTATION_SPACE
THEIR_NAMES = {name: name.title().replace("_", "") for name in RAND_AUGMENT_OPS} | {"autocontrast": "AutoContrast"}


@pytest.mark.parametrize("name", RAND_AUGMENT_OPS)
@pytest.mark.parametrize("magnitude", [0, 7, 9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_torchvisions(name, magnitude, sign):
    image = as_tensor(PHOTO)
    magnitudes, signed = SPACE[THEIR_NAMES[name]]
    sign = sign if signed else 1
    severities = magnitudes(31, *image.shape[1:])
    severity = 0.0 if severities is None else float(severities[magnitude]) * sign
    expected = v2.RandAugment()._apply_image_or_video_transform(
        image, THEIR_NAMES[name], severity, interpolation=v2.InterpolationMode.NEAREST, fill={}
    )
    result = apply_op(image, name, sign * magnitude / 30)
    assert result.dtype == torch.uint8 and (result.int() - expected.int()).abs().float().mean() < 0.05
    if name != "identity" and magnitude == 30:
        assert not torch.equal(result, image)


def test_all_operations_of_torchvision_are_there_and_drawn():
    assert {THEIR_NAMES[name] for name in RAND_AUGMENT_OPS} == set(SPACE)
    config = AugmentConfig(**WHOLE, rand_augment_ops=1, rand_augment_magnitude=15)
    results = {augment(PHOTO, 48, config, generator(i)).numpy().tobytes() for i in range(300)}
    assert len(results) == 5 + 2 * 9, "an operation, or one of its signs, is never drawn"
    config = AugmentConfig(**WHOLE, rand_augment_ops=1, rand_augment_magnitude=0)
    results = {augment(PHOTO, 48, config, generator(i)).numpy().tobytes() for i in range(100)}
    assert len(results) == 3, "only autocontrast and equalize change anything without strength"


def test_jitter_stays_within_its_amounts():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    means = [jitter_color(grey, (0.5, 0, 0, 0), generator(i)).float().mean().item() for i in range(300)]
    assert 49 <= min(means) < 55 and 145 < max(means) <= 150 and abs(np.mean(means) - 100) < 4
    image = as_tensor(PHOTO)
    for amounts, kernel, low in (
        ((0, 0.3, 0, 0), v2.functional.adjust_contrast, 0.7),
        ((0, 0, 2.0, 0), v2.functional.adjust_saturation, 0.0),
        ((0, 0, 0, 0.2), v2.functional.adjust_hue, -0.2),
    ):
        draws = generator(3).random((2, 4))[1]
        amount = max(amounts)
        factor = low + ((amount if low < 0 else 1 + amount) - low) * draws[np.argmax(amounts)]
        assert torch.equal(jitter_color(image, amounts, generator(3)), kernel(image, factor))


def test_jitter_comes_in_every_order():
    # Brightness and contrast do not commute where values are clipped.
    image = as_tensor(PHOTO)
    first = [bool(np.less(*generator(position).random((2, 4))[0, :2])) for position in range(8)]
    assert len(set(first)) == 2
    for position in range(8):
        places, changes = generator(position).random((2, 4))
        expected = image
        kernels = [lambda x, f=0.1 + 1.8 * changes[0]: v2.functional.adjust_brightness(x, f)]
        kernels.append(lambda x, f=0.1 + 1.8 * changes[1]: v2.functional.adjust_contrast(x, f))
        for kernel in kernels if places[0] < places[1] else kernels[::-1]:
            expected = kernel(expected)
        assert torch.equal(jitter_color(image, (0.9, 0.9, 0, 0), generator(position)), expected)


def test_shares_of_gray_and_of_jitter():
    config = AugmentConfig(**WHOLE, gray_prob=0.25, color_jitter=(0, 0, 0, 0.5), color_jitter_prob=0.5)
    image = np.full((4, 4, 3), (200, 40, 40), np.uint8)
    results = [augment(image, 4, config, generator(i)) for i in range(600)]
    gray = sum(bool((r[0] == r[1]).all() and (r[1] == r[2]).all()) for r in results)
    same = sum(torch.equal(r, as_tensor(image)) for r in results)
    assert 0.2 < gray / 600 < 0.3 and 0.3 < same / 600 < 0.45  # 0.75 x 0.5
    red = augment(image, 4, AugmentConfig(**WHOLE, gray_prob=1.0), generator(0))
    assert red[:, 0, 0].tolist() == [87, 87, 87]  # 0.2989 x 200 + 0.7011 x 40 = 87.8, cut off


def test_what_is_off_draws_nothing():
    """So that switching one variation on leaves the crops of a run as they were."""
    plain = AugmentConfig(crop_scale=(0.2, 0.9))
    varied = AugmentConfig(crop_scale=(0.2, 0.9), gray_prob=1.0)
    for position in range(5):
        expected = v2.functional.rgb_to_grayscale(augment(PHOTO, 32, plain, generator(position)), 3)
        assert torch.equal(augment(PHOTO, 32, varied, generator(position)), expected)
        rng = generator(position)
        augment(PHOTO, 32, AugmentConfig(**WHOLE), rng)
        assert rng.random() == generator(position).random()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"rand_augment_ops": -1}, "rand_augment_ops"),
        ({"rand_augment_magnitude": 31}, "rand_augment_magnitude"),
        ({"color_jitter": (0.1, -0.1, 0, 0)}, "color_jitter"),
        ({"color_jitter": (0.1, 0.1, 0, 0.6)}, "color_jitter"),
        ({"color_jitter_prob": 1.1}, "color_jitter_prob"),
        ({"gray_prob": -0.1}, "gray_prob"),
    ],
)
def test_bad_augment_options(options, name):
    with pytest.raises(UserError, match=f"^{name} "):
        AugmentConfig(**options)
