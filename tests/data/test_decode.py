"""Expectations are numbers written here, or come from Pillow along a path that decode() does not take."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from contrastive.data.decode import EXIF_ORIENTATION, MAX_PIXELS, decode
from contrastive.data.record import BadSample

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
SMOOTH = np.stack(
    [
        np.add.outer(np.arange(48) * 2, np.arange(64)),
        np.add.outer(np.arange(48), np.arange(64)),
        np.full((48, 64), 90),
    ],
    axis=2,
).astype(np.uint8)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image, **options):
    decoded = decode(image, **options)
    assert decoded.shape[0] == 3 and decoded.dtype.is_signed is False
    return decoded.permute(1, 2, 0).numpy()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits, colour, rows, *extra):
    """A PNG by hand: `rows` are the raw scan lines, without filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encode(Image.fromarray(RGB), format, **options)), RGB)


def test_array_is_passed_through_without_a_copy():
    assert np.shares_memory(decode(RGB).numpy(), RGB)
    frozen = RGB.copy()
    frozen.flags.writeable = False
    assert np.array_equal(pixels(frozen), RGB)
    assert np.array_equal(pixels(RGB[::-1, ::-1]), RGB[::-1, ::-1])


@pytest.mark.parametrize("array", [RGB.astype(np.float32), RGB[:, :, 0], RGB[:, :, :2], RGB[:0]])
def test_array_of_another_kind_is_a_bad_sample(array):
    with pytest.raises(BadSample) as fault:
        decode(array)
    assert fault.value.reason == "unreadable_image"


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_is_what_pillow_decodes(subsampling):
    data = encode(Image.fromarray(SMOOTH), "JPEG", quality=90, subsampling=subsampling)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))
    assert np.abs(pixels(data).astype(int) - SMOOTH).mean() < 3


def test_grey_and_progressive_jpeg():
    grey = SMOOTH[:, :, 0]
    data = encode(Image.fromarray(grey), "JPEG", quality=95, progressive=True)
    assert np.abs(pixels(data).astype(int) - grey[:, :, None]).max() <= 6


def test_jpeg_shrinks_while_both_sides_stay_large_enough():
    data = encode(Image.fromarray(np.repeat(np.repeat(SMOOTH, 4, 0), 4, 1)), "JPEG")  # 192 x 256
    assert pixels(data).shape == (192, 256, 3)
    assert pixels(data, min_side=97).shape == (192, 256, 3)
    assert pixels(data, min_side=96).shape == (96, 128, 3)
    assert pixels(data, min_side=40).shape == (48, 64, 3)
    assert np.abs(pixels(data, min_side=48).astype(int) - SMOOTH).mean() < 3


# Pillow's names for what undoes each orientation (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "PNG": {}}[format]
    data = encode(Image.fromarray(SMOOTH), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as stored:
        stored = stored.convert("RGB")
        expected = stored.transpose(UPRIGHT[orientation]) if orientation > 1 else stored
    assert np.array_equal(pixels(data), np.asarray(expected))
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pixels(opened), np.asarray(expected)), "a PIL image from a source differs"


def test_exif_orientation_6_turns_the_left_edge_up():
    """The meaning of one value in plain numbers: row 0 of the file is the right-hand side of the picture."""
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0] = 200
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    upright = pixels(encode(Image.fromarray(stored), "PNG", exif=exif))
    assert upright.shape == (3, 2, 3)
    assert (upright[:, 1] == 200).all() and (upright[:, 0] == 0).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture():
    data = encode(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f")
    assert pixels(data).shape == (48, 64, 3)


def test_alpha_is_laid_on_white():
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    result = pixels(encode(Image.fromarray(np.concatenate([RGB, alpha], 2)), "PNG")).astype(int)
    share = alpha / 255
    assert np.abs(result - (RGB * share + 255 * (1 - share))).max() <= 1
    assert (result[0] == 255).all() and np.array_equal(result[1], RGB[1])


def test_grey_with_alpha():
    grey = np.array([[0, 100, 200]], np.uint8)
    alpha = np.array([[0, 255, 128]], np.uint8)
    result = pixels(encode(Image.fromarray(np.stack([grey, alpha], 2), "LA"), "PNG")).astype(int)
    assert np.abs(result - np.array([255, 100, 200 * 128 / 255 + 127])[None, :, None]).max() <= 1


def test_palette_with_transparency():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encode(image, "PNG", transparency=bytes([0, 255, 51]))
    expected = [[255, 255, 255], [40, 50, 60], [218, 220, 222]]  # 51 / 255 is a fifth
    assert np.abs(pixels(data).astype(int)[0] - expected).max() <= 1


def test_transparent_colour_of_an_rgb_png():
    data = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert pixels(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(format):
    values = np.array([[0, 1, 256, 257, 32768, 65534, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    if format == "PNG":
        data = png(7, 1, 16, 0, [values.astype(">u2").tobytes()])
    else:
        data = encode(Image.fromarray(values), "TIFF")
    assert pixels(data)[0].tolist() == [[value] * 3 for value in expected]


def test_16_bit_grey_with_a_transparent_value():
    values = np.array([[1000, 30000]], ">u2")
    data = png(2, 1, 16, 0, [values.tobytes()], chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels(data)[0].tolist() == [[255] * 3, [117] * 3]


def test_16_bit_rgb():
    values = np.array([[0, 32768, 65535]], ">u2")
    assert pixels(png(1, 1, 16, 2, [values.tobytes()]))[0, 0].tolist() == [0, 128, 255]


def test_one_bit_image():
    assert pixels(encode(Image.fromarray(np.array([[True, False]])), "PNG"))[0].tolist() == [
        [255] * 3,
        [0] * 3,
    ]


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:] = (255, 0, 128, 0)
    inks[8:, :] = (0, 0, 0, 200)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    result = pixels(encode(Image.fromarray(inks, "CMYK"), format, **options)).astype(int)
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(result - expected).max() <= 3
    assert np.abs(result[0, 0] - 255).max() <= 3, "no ink is white"


def test_gif_gives_its_first_frame():
    frames = [Image.fromarray(np.full((4, 5), value, np.uint8)).convert("P") for value in (30, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == 30).all()


def test_first_frame_of_a_two_page_tiff():
    pages = [Image.fromarray(np.full((4, 5, 3), value, np.uint8)) for value in (7, 9)]
    assert (pixels(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == 7).all()


def test_caller_keeps_his_image():
    image = Image.fromarray(RGB)
    image.putalpha(10)
    before = image.copy()
    decode(image)
    assert image.mode == "RGBA" and image == before


GOOD_JPEG, GOOD_PNG = encode(Image.fromarray(SMOOTH), "JPEG"), encode(Image.fromarray(RGB), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>404 Not Found</body></html>",
        GOOD_JPEG[: len(GOOD_JPEG) // 2],
        GOOD_JPEG[:4],
        GOOD_JPEG[:30] + b"\xff" * 400,
        GOOD_PNG[: len(GOOD_PNG) // 2],
        GOOD_PNG[:60] + b"\0" * 40 + GOOD_PNG[100:],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0" * 512,
    ],
)
def test_unreadable_images(data):
    with pytest.raises(BadSample) as fault:
        decode(data)
    assert fault.value.reason == "unreadable_image"


def jpeg_that_claims(height, width):
    start = GOOD_JPEG.index(b"\xff\xc0")
    return GOOD_JPEG[: start + 5] + struct.pack(">HH", height, width) + GOOD_JPEG[start + 9 :]


@pytest.mark.parametrize(
    "data",
    [png(12000, 12000, 8, 2, []), png(60000, 60000, 1, 0, []), jpeg_that_claims(30000, 30000)],
    ids=["144 megapixel png", "3.6 gigapixel png", "900 megapixel jpeg"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_bombs_are_refused_before_they_are_decoded(data):
    begun = time.perf_counter()
    with pytest.raises(BadSample) as fault:
        decode(data)
    assert time.perf_counter() - begun < 0.5
    assert fault.value.reason in ("too_large", "unreadable_image")


def test_limit_is_about_the_picture_not_the_file():
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(BadSample) as fault:
        decode(Image.new("1", (side, side)))
    assert fault.value.reason == "too_large"


def test_text_bomb_in_a_png_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 200_000_000, 1))
    begun = time.perf_counter()
    with pytest.raises(BadSample):
        decode(png(1, 1, 8, 2, [b"\1\2\3"], bomb))
    assert time.perf_counter() - begun < 2


def test_tiff_orientation():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[EXIF_ORIENTATION] = 3
    data = encode(Image.fromarray(RGB), "TIFF", tiffinfo=tags)
    assert np.array_equal(pixels(data), RGB[::-1, ::-1])
