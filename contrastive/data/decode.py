"""From the bytes of an image file to RGB pixels, of a mask's to the class of each pixel; the same from every source."""

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from contrastive.data.record import BadSample
from contrastive.errors import UserError

# A file may be small and its picture huge: 50 megapixels are 150 MB of RGB, above every common camera.
MAX_PIXELS = 50_000_000
# Pillow holds 4 bytes of each pixel beside those 3: 300 MB in all. A WebP and a turned TIFF it holds several times.
MAX_PILLOW_PIXELS, MAX_COPIED_PIXELS = 40_000_000, 16_000_000
BAND_PIXELS = 2_000_000
# Named, because Pillow otherwise tries every plugin it has, some of which run other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that swap height and width
# Sizes in between, as 5/8, take longer to decode than they save.
REDUCTIONS = (8, 4, 2)
INDEXED = ("P", "L", "1", "I", "I;16")
"""Pillow's modes of one whole number a pixel."""
MOST_VALUE = 255
IGNORED = 255
"""The value that VOC, Cityscapes and most others give to pixels that do not count."""

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
ChooseCrop = Callable[[int, int], Box]
MinSide = int | Callable[[int, int], tuple[int, int]]


def decode(
    image: bytes | Image.Image | np.ndarray, choose_crop: ChooseCrop | None = None, min_side: MinSide | None = None
) -> torch.Tensor:
    """Return the pixels of an image as uint8 RGB (3, H, W).

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, CMYK is
    converted, and of an animation the first frame is taken. An array (H, W, 3) uint8 is passed through.

    Args:
        choose_crop: called with the upright picture's (height, width), returns the (top, left, height, width)
            to keep; it may be called twice. None keeps it all.
        min_side: when given, a JPEG may come back at 1/2, 1/4 or 1/8 of its size (scaled inside the inverse
            DCT, which is far cheaper than decoding it all), as long as both sides of what is kept have
            `min_side` pixels; or the (height, width) that it returns for those of what is kept.

    Raises:
        BadSample: 'unreadable_image', or 'too_large' above MAX_PIXELS; the caller fills in the key.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise BadSample("unreadable_image")
        pixels = _cut(image, choose_crop)
    else:
        try:
            if isinstance(image, bytes):
                pixels = _decode_file(image, choose_crop, min_side)
            else:
                pixels = _cut(_to_rgb(image), choose_crop)
        except BadSample:
            raise
        except Exception as error:  # Pillow's plugins raise whatever the damaged bytes lead them to
            raise BadSample("unreadable_image") from error
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # torch takes neither
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _cut(pixels: np.ndarray, choose_crop: ChooseCrop | None) -> np.ndarray:
    if choose_crop is None:
        return pixels
    top, left, height, width = choose_crop(*pixels.shape[:2])
    return pixels[top : top + height, left : left + width]


def _decode_file(data: bytes, choose_crop: ChooseCrop | None, min_side: MinSide | None) -> np.ndarray:
    if data[:3] == b"\xff\xd8\xff":
        try:
            return _decode_jpeg(data, choose_crop or (lambda height, width: (0, 0, height, width)), min_side)
        except ValueError:
            pass  # CMYK, or an oddity that Pillow forgives
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        return _cut(_to_rgb(opened), choose_crop)


def _decode_jpeg(data: bytes, choose_crop: ChooseCrop, min_side: MinSide | None) -> np.ndarray:
    import simplejpeg

    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise BadSample("too_large")
    if colorspace in ("CMYK", "YCCK"):
        raise ValueError("left to Pillow, which knows Adobe's inverted inks")
    orientation = _jpeg_orientation(data)
    box = choose_crop(*((width, height) if orientation in TURNED else (height, width)))
    rows, columns = min_side(*box[2:]) if callable(min_side) else (min_side, min_side)
    factor = next((f for f in REDUCTIONS if min_side and box[2] >= f * rows and box[3] >= f * columns), 1)
    shrink = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
    pixels = simplejpeg.decode_jpeg(data, "RGB", **(shrink if factor > 1 else {}))
    return _cut(_orient(pixels, orientation), functools.partial(_reduced, box, factor))


def _reduced(box: Box, factor: int, height: int, width: int) -> Box:
    """Return the box on a picture reduced by `factor`, within its (height, width)."""
    rows, columns = round(box[2] / factor), round(box[3] / factor)
    return min(round(box[0] / factor), height - rows), min(round(box[1] / factor), width - columns), rows, columns


def _jpeg_orientation(data: bytes) -> int:
    # A plain search is cheap; where it finds nothing, as in most data sets, nothing else is paid.
    header = data[: _first_scan(data)]
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:
        return 1
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
        return opened.getexif().get(EXIF_ORIENTATION, 1)


def _first_scan(data: bytes) -> int:
    """Return where the segments before the compressed data end; the end of the data where they are unusual."""
    place = 2
    while data[place : place + 1] == b"\xff":
        if data[place + 1 : place + 2] == b"\xda":
            return place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; other values mean none) on pixels (H, W, 3)."""
    if orientation in TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return the upright picture (H, W, 3), made in bands: Pillow's steps would each copy all of a large one."""
    width, height = image.size
    copied = image.format == "WEBP" or (image.format == "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    if width * height > (MAX_COPIED_PIXELS if copied else MAX_PILLOW_PIXELS):
        raise BadSample("too_large")
    image.load()  # which turns a TIFF
    width, height = image.size
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    rows = max(1, BAND_PIXELS // width)
    if rows >= height:
        return _orient(_band_to_rgb(image), orientation)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        pixels[top : top + rows] = _band_to_rgb(image.crop((0, top, width, min(top + rows, height))))
    return _orient(pixels, orientation)


def _band_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_16_bit(image: Image.Image) -> np.ndarray:
    """Scale 0..65535 to 0..255; Pillow's own conversion cuts everything above 255 to white."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)  # rounded
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def decode_mask(
    mask: bytes | np.ndarray, size: tuple[int, int], names: Sequence[str] | None, ignore: Sequence[int], key: str
) -> np.ndarray:
    """Return the class of each pixel, uint8 (H, W).

    Args:
        mask: an array of whole numbers (H, W), or a file, PNG as a rule, of indices: a palette's colours do not count.
        size: height and width of the picture, which the mask has to have.
        names: of the classes, from 0: values above are refused but for those of `ignore`. None: all up to 255 are good.
        key: of the sample, for messages.

    Raises:
        BadSample: 'unreadable_mask'. UserError: colours in place of indices, another size, a value out of range.
    """
    values = mask if isinstance(mask, np.ndarray) else _read_mask(mask, key)
    if values.shape != tuple(size):
        told = "×".join(map(str, values.shape[::-1]))
        raise UserError(f"{key}: the mask has {told} pixels, its image {size[1]}×{size[0]}; they have to be the same")
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > MOST_VALUE:
        raise UserError(f"{key}: the mask has the value {least if least < 0 else most}; classes go from 0 to 255")
    known = [*range(len(names) if names else 256), *ignore]
    if beyond := sorted({*np.unique(values).tolist()} - {*known}):
        raise UserError(
            f"{key}: the mask has the value {beyond[0]}, but there are {len(names)} class names, of 0 to "
            f"{len(names) - 1}; name it too, or leave it out by --option ignore='[255, {beyond[0]}]'"
        )
    return np.ascontiguousarray(values, np.uint8)


def _read_mask(data: bytes, key: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            kind, mode = opened.format, opened.mode
            if kind == "JPEG" or mode not in INDEXED:
                held = "a JPEG, which blurs them" if kind == "JPEG" else f"a picture of kind {mode}"
                raise UserError(f"{key}: the mask is {held}; masks are PNGs of class indices, grey or with a palette")
            if opened.width * opened.height > MAX_PILLOW_PIXELS:
                raise BadSample("unreadable_mask", key)
            return np.array(opened, np.uint8 if mode == "1" else None)
    except (UserError, BadSample):
        raise
    except Exception as error:  # Pillow's plugins raise whatever the damaged bytes lead them to
        raise BadSample("unreadable_mask", key) from error
