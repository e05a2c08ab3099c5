"""From the bytes of an image file to RGB pixels, the same from every source."""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from contrastive.data.record import BadSample

# A file may be small and its picture huge: 50 megapixels are 150 MB of RGB, above every common camera.
MAX_PIXELS = 50_000_000
# Named, because Pillow otherwise tries every plugin it has, some of which run other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXIF_ORIENTATION = 0x0112


def decode(image: bytes | Image.Image | np.ndarray, min_side: int | None = None) -> torch.Tensor:
    """Return the pixels of an image as uint8 RGB (3, H, W).

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, CMYK is
    converted, and of an animation the first frame is taken. An array (H, W, 3) uint8 is passed through.

    Args:
        min_side: when given, a JPEG may come back at 1/2, 1/4 or 1/8 of its size (scaled inside the inverse
            DCT, which is far cheaper than decoding it all), as long as both sides keep `min_side` pixels.

    Raises:
        BadSample: 'unreadable_image', or 'too_large' above MAX_PIXELS; the caller fills in the key.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise BadSample("unreadable_image")
        pixels = image
    else:
        try:
            pixels = _decode_file(image, min_side) if isinstance(image, bytes) else _to_rgb(image)
        except BadSample:
            raise
        except Exception as error:  # Pillow's plugins raise whatever the damaged bytes lead them to
            raise BadSample("unreadable_image") from error
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # torch takes neither
        pixels = pixels.copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_file(data: bytes, min_side: int | None) -> np.ndarray:
    if data[:3] == b"\xff\xd8\xff":
        try:
            return _decode_jpeg(data, min_side)
        except ValueError:
            pass  # CMYK, or an oddity that Pillow forgives
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        return _to_rgb(opened)


def _decode_jpeg(data: bytes, min_side: int | None) -> np.ndarray:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise BadSample("too_large")
    if colorspace in ("CMYK", "YCCK"):
        raise ValueError("left to Pillow, which knows Adobe's inverted inks")
    shrink = {"min_height": min_side, "min_width": min_side, "min_factor": 2} if min_side else {}
    pixels = simplejpeg.decode_jpeg(data, "RGB", **shrink)
    # A plain search is cheap; where it finds nothing, as in most data sets, nothing else is paid.
    if b"Exif\0\0" in data or b"tiff:Orientation" in data:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            pixels = _orient(pixels, opened.getexif().get(EXIF_ORIENTATION, 1))
    return pixels


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; other values mean none) on pixels (H, W, 3)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("too_large")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _grey_16_bit(image: Image.Image) -> np.ndarray:
    """Scale 0..65535 to 0..255; Pillow's own conversion cuts everything above 255 to white."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)  # rounded
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)
