"""Shards that benchmarks/data.py makes: JPEGs of any size whose spectrum, and so whose cost, is a photograph's."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS = 8
COARSEST = 8  # octaves: the largest structures are an eighth of the picture
FALL = 0.7  # of the strength from one octave to the next; files come out as large as photographs'
GRAIN = 3.0  # standard deviation of the finest detail, of 255


def generate(folder: Path, width: int, height: int, quality: int, images: int) -> str:
    """Write `images` samples (KEY.jpg, KEY.txt, KEY.json) in SHARDS shards and return their specification."""
    from webdataset import TarWriter

    folder.mkdir()
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0, encoder=False) as tar:
            for number in range(shard, images, SHARDS):
                caption = f"a picture of noise, the one with number {number}, wide and without a horizon"
                sample = {"jpg": _photo_like(width, height, quality, number), "txt": caption.encode()}
                sample["json"] = json.dumps({"captions": [caption]}).encode()
                tar.write({"__key__": f"{number:06d}", **sample})
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


def _photo_like(width: int, height: int, quality: int, seed: int) -> bytes:
    """Return a JPEG of noise of all scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    # One picture is costly to draw; its crops at random places are as good as new ones for a decoder.
    base = _base(width, height)
    top, left = rng.integers(0, height), rng.integers(0, width)
    pixels = np.roll(base, (top, left), axis=(0, 1)) + rng.normal(0, GRAIN, base.shape[:2])[:, :, None]
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=quality)
    return data.getvalue()


_bases: dict[tuple[int, int], np.ndarray] = {}


def _base(width: int, height: int) -> np.ndarray:
    """Return float32 (height, width, 3): light at all scales, color at the coarse ones."""
    if (width, height) not in _bases:
        rng, total = np.random.default_rng(0), np.full((height, width, 3), 128, np.float32)
        cells, strength = COARSEST, 40.0
        while cells < max(width, height):
            rows, columns = max(1, cells * height // max(width, height)), max(1, cells * width // max(width, height))
            light = rng.normal(0, strength, (rows, columns)).astype(np.float32)
            color = rng.normal(0, strength / 3, (rows, columns, 3)).astype(np.float32)
            for channel in range(3):
                octave = Image.fromarray(light + color[:, :, channel])
                total[:, :, channel] += np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC))
            cells, strength = cells * 2, strength * FALL
        _bases[width, height] = total
    return _bases[width, height]
