"""Rows 23 to 25 of the fault matrix: images that cannot be used, odd kinds of images, bombs."""

import gzip
import io
import re
import struct
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import RGB, RNG, SMOOTH, chunk, encode, pixels, png
from PIL import Image
from shard_writing import write_tar

from contrastive.data.augment import AugmentConfig
from contrastive.data.decode import EXIF_ORIENTATION, MAX_PIXELS, decode
from contrastive.data.loader import train_loader
from contrastive.data.order import Order
from contrastive.data.record import BadSample
from contrastive.data.samples import PairDataset
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError

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
        gzip.compress(GOOD_PNG, mtime=0),
    ],
)
def test_row_23_unreadable_images(data):
    with pytest.raises(BadSample) as fault:
        decode(data)
    assert fault.value.reason == "unreadable_image"


UNUSABLE = {
    2: b"",
    5: b"<html><body>404 Not Found</body></html>",
    7: GOOD_JPEG[: len(GOOD_JPEG) // 2],
    11: GOOD_JPEG[:30] + b"\xff" * 400,
    13: b"\x89PNG\r\n\x1a\n",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    members = []
    for index in range(24):
        picture = encode(Image.fromarray(np.full((20, 24, 3), 10 * index, np.uint8)), "JPEG", quality=95)
        members += [(f"{index:02d}.jpg", UNUSABLE.get(index, picture)), (f"{index:02d}.txt", f"shade {index}".encode())]
    return write_tar(tmp_path_factory.mktemp("row23") / "shades.tar", members)


def steps(shard, rank=0, world_size=1, num_workers=0, num_steps=6):
    source, words = open_source(shard), train_bpe([f"shade {index}" for index in range(24)], 300, 12)
    dataset = PairDataset(source, Order(len(source), 8, 0), words, 16, AugmentConfig())
    options = {"rank": rank, "world_size": world_size, "num_workers": num_workers, "num_steps": num_steps}
    return list(train_loader(dataset, **options)), words


@pytest.mark.parametrize("num_workers", [0, 2])
def test_row_23_unusable_images_are_replaced_and_counted_and_batches_stay_full(shard, num_workers):
    ranks = [steps(shard, rank, 2, num_workers) for rank in range(2)]  # 48 positions: two epochs
    found = [fault for batches, _ in ranks for batch in batches for fault in batch["bad"]]
    counted = {key.rpartition("/")[2]: sum(k == key for _, k in found) for _, key in found}
    assert {reason for reason, _ in found} == {"unreadable_image"}
    assert set(counted) == {f"{index:02d}" for index in UNUSABLE} and min(counted.values()) >= 2
    for batches, words in ranks:
        for batch in batches:
            assert batch["image"].shape == (4, 3, 16, 16) and not set(batch["index"].tolist()) & set(UNUSABLE)
            for image, tokens, index in zip(batch["image"], batch["tokens"], batch["index"].tolist(), strict=True):
                assert words.decode(tokens) == f"shade {index}", "the stand-in's caption is not its own"
                assert (image.int() - 10 * index).abs().max() <= 2
    alone, _ = steps(shard)
    for one, *parts in zip(alone, *(batches for batches, _ in ranks), strict=True):
        assert torch.equal(one["image"], torch.cat([part["image"] for part in parts]))
        assert one["bad"] == sum((part["bad"] for part in parts), [])


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
def test_row_24_exif_orientation(orientation, format):
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


def test_row_24_exif_orientation_6_turns_the_left_edge_up():
    """The meaning of one value in plain numbers: row 0 of the file is the right-hand side of the picture."""
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0] = 200
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    upright = pixels(encode(Image.fromarray(stored), "PNG", exif=exif))
    assert upright.shape == (3, 2, 3)
    assert (upright[:, 1] == 200).all() and (upright[:, 0] == 0).all()


def test_row_24_alpha_is_laid_on_white():
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    result = pixels(encode(Image.fromarray(np.concatenate([RGB, alpha], 2)), "PNG")).astype(int)
    share = alpha / 255
    assert np.abs(result - (RGB * share + 255 * (1 - share))).max() <= 1
    assert (result[0] == 255).all() and np.array_equal(result[1], RGB[1])


def test_row_24_grey_with_alpha():
    grey = np.array([[0, 100, 200]], np.uint8)
    alpha = np.array([[0, 255, 128]], np.uint8)
    result = pixels(encode(Image.fromarray(np.stack([grey, alpha], 2), "LA"), "PNG")).astype(int)
    assert np.abs(result - np.array([255, 100, 200 * 128 / 255 + 127])[None, :, None]).max() <= 1


def test_row_24_palette_with_transparency():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encode(image, "PNG", transparency=bytes([0, 255, 51]))
    expected = [[255, 255, 255], [40, 50, 60], [218, 220, 222]]  # 51 / 255 is a fifth
    assert np.abs(pixels(data).astype(int)[0] - expected).max() <= 1


def test_row_24_transparent_colour_of_an_rgb_png():
    data = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert pixels(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_row_24_16_bit_grey_is_scaled(format):
    values = np.array([[0, 1, 256, 257, 32768, 65534, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    if format == "PNG":
        data = png(7, 1, 16, 0, [values.astype(">u2").tobytes()])
    else:
        data = encode(Image.fromarray(values), "TIFF")
    assert pixels(data)[0].tolist() == [[value] * 3 for value in expected]


def test_row_24_16_bit_grey_with_a_transparent_value():
    values = np.array([[1000, 30000]], ">u2")
    data = png(2, 1, 16, 0, [values.tobytes()], chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels(data)[0].tolist() == [[255] * 3, [117] * 3]


def test_row_24_16_bit_rgb():
    values = np.array([[0, 32768, 65535]], ">u2")
    assert pixels(png(1, 1, 16, 2, [values.tobytes()]))[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_row_24_cmyk(format):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:] = (255, 0, 128, 0)
    inks[8:, :] = (0, 0, 0, 200)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    result = pixels(encode(Image.fromarray(inks, "CMYK"), format, **options)).astype(int)
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(result - expected).max() <= 3
    assert np.abs(result[0, 0] - 255).max() <= 3, "no ink is white"


def test_row_24_gif_gives_its_first_frame():
    frames = [Image.fromarray(np.full((4, 5), value, np.uint8)).convert("P") for value in (30, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == 30).all()


def odd_files():
    """One file for each kind that row 24 names, with the pixels it has to give."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    grey_16 = np.array([[0, 257, 32896, 65535]], np.uint16)
    la = np.array([[[0, 0], [100, 255]]], np.uint8)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    frames = [Image.fromarray(np.full((4, 5), value, np.uint8)).convert("P") for value in (30, 200)]
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:] = (255, 0, 0, 0)
    cyan = np.broadcast_to(np.array([0, 255, 255]), (16, 16, 3))
    return {
        "grey16.png": (encode(Image.fromarray(grey_16), "PNG"), [[[v] * 3 for v in (0, 1, 128, 255)]]),
        "la.png": (encode(Image.fromarray(la, "LA"), "PNG"), [[[255] * 3, [100] * 3]]),
        "palette.png": (encode(palette, "PNG", transparency=bytes([0, 255])), [[[255] * 3, [40, 50, 60]]]),
        "exif.png": (encode(Image.fromarray(RGB), "PNG", exif=exif), np.rot90(RGB, -1)),
        "cmyk.jpg": (encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0), cyan),
        "frames.gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.full((4, 5, 3), 30)),
    }


@pytest.mark.parametrize("kind", ["shard", "folder", "csv", "parquet"])
def test_row_24_the_same_pixels_from_every_source(kind, tmp_path):
    files = odd_files()
    for number, (name, (data, _)) in enumerate(files.items()):
        (tmp_path / f"{number}-{name}").write_bytes(data)
        (tmp_path / f"{number}-{name}").with_suffix(".txt").write_text("x")
    names = [f"{number}-{name}" for number, name in enumerate(files)]
    spec = tmp_path
    if kind == "shard":
        members = [(name, (tmp_path / name).read_bytes()) for name in names]
        texts = [(f"{name.partition('.')[0]}.txt", b"x") for name in names]
        spec = write_tar(tmp_path / "odd.tar", [member for pair in zip(members, texts, strict=True) for member in pair])
    elif kind == "csv":
        spec = tmp_path / "odd.csv"
        spec.write_text("image,caption\n" + "".join(f"{name},x\n" for name in names))
    elif kind == "parquet":
        spec = tmp_path / "odd.parquet"
        images = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in names]
        pq.write_table(pa.table({"image": images, "caption": ["x"] * len(names)}), spec)
    source = open_source(str(spec))
    assert len(source) == len(files)
    for index, (name, (_, expected)) in enumerate(files.items()):
        result, expected = pixels(source[index].image).astype(int), np.asarray(expected)
        close = 3 if name == "cmyk.jpg" else 0
        assert result.shape == expected.shape and np.abs(result - expected).max() <= close, name


def jpeg_that_claims(height, width):
    start = GOOD_JPEG.index(b"\xff\xc0")
    return GOOD_JPEG[: start + 5] + struct.pack(">HH", height, width) + GOOD_JPEG[start + 9 :]


def test_row_25_limit_is_about_the_picture_not_the_file():
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(BadSample) as fault:
        decode(Image.new("1", (side, side)))
    assert fault.value.reason == "too_large"


def peak_megabytes(action):
    """Memory that `action` takes at its peak, above what was in use."""

    def status(name):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{name}:\s+(\d+)", file.read())[1]) / 1024

    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
    except OSError:
        pytest.skip("needs /proc/self/clear_refs to measure memory")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def bombs():
    long = zlib.compress(bytes(320_000_000), 1)
    rows = [bytes(12_000)] * 12_000
    wide = struct.pack("<I", 11_999 | 11_999 << 14)
    return {
        "144 megapixel png": png(12_000, 12_000, 8, 0, rows),
        "3.6 gigapixel png": png(60_000, 60_000, 1, 0, []),
        "900 megapixel jpeg": jpeg_that_claims(30_000, 30_000),
        "144 megapixel bmp": encode(Image.new("1", (12_000, 12_000)), "BMP"),
        "144 megapixel gif": encode(Image.new("P", (12_000, 12_000)), "GIF"),
        "144 megapixel webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0/" + wide + bytes(9),
        "text bomb": png(1, 1, 8, 2, [b"\1\2\3"], chunk(b"zTXt", b"Comment\0\0" + long)),
        "profile bomb": png(1, 1, 8, 2, [b"\1\2\3"], chunk(b"iCCP", b"x\0\0" + long)),
        "gzip bomb": gzip.compress(bytes(32_000_000), 1) * 10,  # its members are unpacked as one
    }


@pytest.fixture(scope="module")
def bomb_files():
    return bombs()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("144 megapixel png", "3.6 gigapixel png", "900 megapixel jpeg", "144 megapixel bmp", "144 megapixel gif"),
        *("144 megapixel webp", "text bomb", "profile bomb", "gzip bomb"),
    ],
)
def test_row_25_bombs_are_refused_within_two_seconds_and_300_megabytes(bomb_files, name):
    data, reasons = bomb_files[name], []

    def refuse():
        try:
            decode(data)
        except BadSample as fault:
            reasons.append(fault.reason)

    begun = time.process_time()
    peak = peak_megabytes(refuse)
    assert time.process_time() - begun < 2 and peak < 300, peak
    assert reasons in (["too_large"], ["unreadable_image"]), "it was decoded"


def test_row_25_gzip_bomb_in_place_of_a_shard_is_refused(tmp_path, bomb_files):
    path = tmp_path / "bomb.tar"
    path.write_bytes(bomb_files["gzip bomb"])

    def refuse():
        with pytest.raises(UserError, match="bomb.tar"):
            open_source(str(path))

    begun = time.process_time()
    assert peak_megabytes(refuse) < 300 and time.process_time() - begun < 2
