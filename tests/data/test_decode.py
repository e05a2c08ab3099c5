"""Expectations are numbers written here, or come from Pillow along a path that decode() does not take."""

import io

import numpy as np
import pytest
from pictures import RGB, SMOOTH, encode, pixels
from PIL import Image, TiffImagePlugin

from contrastive.data.decode import EXIF_ORIENTATION, decode
from contrastive.data.record import BadSample


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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture():
    data = encode(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f")
    assert pixels(data).shape == (48, 64, 3)


def test_one_bit_image():
    assert pixels(encode(Image.fromarray(np.array([[True, False]])), "PNG"))[0].tolist() == [[255] * 3, [0] * 3]


def test_first_frame_of_a_two_page_tiff():
    pages = [Image.fromarray(np.full((4, 5, 3), value, np.uint8)) for value in (7, 9)]
    assert (pixels(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == 7).all()


def test_caller_keeps_his_image():
    image = Image.fromarray(RGB)
    image.putalpha(10)
    before = image.copy()
    decode(image)
    assert image.mode == "RGBA" and image == before


def test_tiff_orientation():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[EXIF_ORIENTATION] = 3
    data = encode(Image.fromarray(RGB), "TIFF", tiffinfo=tags)
    assert np.array_equal(pixels(data), RGB[::-1, ::-1])


def test_orientation_is_found_behind_other_segments_and_not_in_the_compressed_data():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    plain = encode(Image.fromarray(SMOOTH), "JPEG", quality=95)
    turned = encode(Image.fromarray(SMOOTH), "JPEG", quality=95, exif=exif)
    # An ICC profile that holds the bytes of a scan's marker, ahead of the EXIF.
    profile = b"\xff\xe2" + (2 + 2000).to_bytes(2, "big") + b"ICC_PROFILE\0\1\1" + b"\xff\xda" * 993
    behind = turned[:2] + profile + turned[2:]
    assert np.array_equal(pixels(behind), pixels(plain)[::-1, ::-1])
    filled = turned[:2] + b"\xff\xff" + turned[2:]  # markers may have more than one 0xff
    assert np.array_equal(pixels(filled), pixels(plain)[::-1, ::-1])
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>'
    segment = b"\xff\xe1" + (2 + len(xmp)).to_bytes(2, "big") + xmp
    assert np.array_equal(pixels(plain[:2] + segment + plain[2:]), pixels(plain)[::-1, ::-1])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_crop_is_chosen_on_the_upright_picture(format):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    data, asked = encode(Image.fromarray(SMOOTH), format, exif=exif), []

    def choose(height, width):
        asked.append((height, width))
        return 5, 7, 20, 30

    assert np.array_equal(pixels(data, choose_crop=choose), pixels(data)[5:25, 7:37])
    assert asked == [(64, 48)]
    assert np.array_equal(pixels(RGB, choose_crop=lambda height, width: (1, 2, 3, 4)), RGB[1:4, 2:6])


def test_compressed_data_is_not_searched_for_an_orientation(monkeypatch):
    data = encode(Image.fromarray(SMOOTH), "JPEG") + b"Exif\0\0"
    monkeypatch.setattr(Image, "open", None)
    assert pixels(data).shape == (48, 64, 3)
