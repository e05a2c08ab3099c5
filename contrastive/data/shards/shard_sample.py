"""One sample as the members of a WebDataset shard."""

import io
import json
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image

from contrastive.data.captions import caption_fault, drawn_order
from contrastive.data.decode import decode
from contrastive.data.preprocess import resize
from contrastive.data.record import BadSample, Record, Source
from contrastive.errors import UserError

# What open_clip and the webdataset library decode too. They pass over a .gif or .tif without a word.
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


@dataclass(frozen=True)
class PackOptions:
    """How samples are stored.

    short_side: images whose short side has more pixels are scaled down to it and stored as JPEG; None keeps all.
    quality: of those JPEGs.
    """

    short_side: int | None = None
    quality: int = 90

    def __post_init__(self):
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"short_side {self.short_side} is not a number of pixels; use 1 or more")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is not in 1..100; 90 is usual")


@dataclass(frozen=True)
class Packed:
    """members: suffix to bytes. bad_captions: why captions were left out. resized: whether the image was."""

    members: dict[str, bytes]
    bad_captions: tuple[str, ...]
    resized: bool


def pack(record: Record, options: PackOptions, class_labels: tuple[str, ...] | None) -> Packed:
    """Return the members of a sample: an image, KEY.txt, KEY.json and KEY.cls as far as it needs them.

    A JPEG, PNG or WebP that needs no resize keeps its bytes, once it has been decoded without an error; other
    images become lossless PNG. The first caption is in KEY.txt; KEY.json holds {"captions": [...]}, and
    "weights" where there are any, if that says more than the text does.

    Args:
        class_labels: what KEY.cls holds for each class (see `class_labels`); None: the label's number.

    Raises:
        BadSample: an image that cannot be read, or neither a usable caption nor a label.
    """
    captions, weights, bad_captions = _usable_captions(record)
    try:
        suffix, image, resized = _pack_image(record.image, options)
    except BadSample as fault:
        raise BadSample(fault.reason, record.key) from fault
    members = {suffix: image}
    if captions:
        members["txt"] = captions[0].encode()
        # A text loses a byte-order mark and the end of its line when it is read back.
        plain = captions[0].rstrip("\r\n") == captions[0] and not captions[0].startswith("\ufeff")
        if len(captions) > 1 or weights is not None or not plain:
            fields = {"captions": captions} | ({"weights": weights} if weights is not None else {})
            members["json"] = json.dumps(fields, ensure_ascii=False).encode()
    if record.label is not None:
        members["cls"] = (class_labels[record.label] if class_labels else str(record.label)).encode()
    return Packed(members, bad_captions, resized)


def class_labels(source: Source) -> tuple[str, ...] | None:
    """Return None where KEY.cls can hold the number of the class, else the names it has to hold.

    A number that is also the name of another class, as folders '1', '10', '2' have it, would be read as the name.
    """
    names = source.class_names or ()
    unclear = any(str(number) in names and names[number] != str(number) for number in range(len(names)))
    return names if unclear else None


def _usable_captions(record: Record) -> tuple[list[str], list[float] | None, tuple[str, ...]]:
    """Return the captions to store, their weights, and the faults of the others."""
    captions = record.captions
    weights = record.caption_weights or (1.0,) * len(captions)
    if record.caption_weights is not None:
        drawn_order(record, 0.0)  # refuses weights that mean nothing
    faults = [caption_fault(caption) for caption in captions]
    kept = [place for place, fault in enumerate(faults) if fault is None and weights[place]]
    if not kept and record.label is None:
        raise BadSample(next(filter(None, faults), "missing_caption"), record.key)
    stored = [weights[place] for place in kept] if record.caption_weights is not None and kept else None
    return [captions[place] for place in kept], stored, tuple(filter(None, faults))


def _pack_image(image: bytes | Image.Image | np.ndarray, options: PackOptions) -> tuple[str, bytes, bool]:
    suffix = _suffix(image) if isinstance(image, bytes) else None
    if suffix and options.short_side is None:
        decode(image, min_side=1)  # at the smallest scale: all of the data is read, few pixels are made
        return suffix, image, False
    pixels = decode(image)
    _, height, width = pixels.shape
    short = min(height, width)
    if options.short_side is not None and short > options.short_side:
        scale = options.short_side / short
        pixels = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        return "jpg", _as_jpeg(pixels, options.quality), True
    return (suffix, image, False) if suffix else ("png", _as_png(pixels), False)


def _suffix(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), None)


def _as_jpeg(pixels: torch.Tensor, quality: int) -> bytes:
    rows = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return simplejpeg.encode_jpeg(rows, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False)


def _as_png(pixels: torch.Tensor) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(data, "PNG")
    return data.getvalue()
