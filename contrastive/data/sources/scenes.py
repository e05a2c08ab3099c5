"""`scenes`: rendered pictures of coloured shapes with captions, needing no files and no network.

Each scene is a pure function of (split, index). Eight of the 64 colour-shape pairs are never drawn nor named
in training, so that `heldout` measures whether a model composes what it learnt. Pictures are drawn with
signed-distance functions: smooth edges at any size, no image library.

Those of the `wide` splits are four times as wide as high, or as high as wide, with a thing at either end. A caption is
true of one of them only with both ends. Squares squash the things in one direction in half of the pictures and in the
other in the rest; images in their own aspect (model.image.native) show them as they are.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from contrastive.data.record import Record, Source, check_index, check_split, fingerprint_of
from contrastive.data.sources.scene_layout import (
    COLOURS,
    ENDS,
    SHAPES,
    SPREAD,
    Backdrop,
    Draws,
    Scene,
    Thing,
    draw_any,
    draw_ends,
    draw_single,
    name_ends,
    word_ends,
    word_scene,
)
from contrastive.errors import UserError

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Each colour and each shape is in exactly one of them.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("green", "heart"),
    ("blue", "triangle"),
    ("yellow", "crescent"),
    ("purple", "square"),
    ("orange", "ring"),
    ("white", "cross"),
    ("cyan", "circle"),
)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

# Which are told apart at each end of `wide-test`: by neither colour nor shape alone.
END_PAIRS = tuple((colour, shape) for colour in ("red", "blue") for shape in ("circle", "square", "heart", "crescent"))
END_CLASSES = tuple((relation, one, two) for relation in ENDS for one in END_PAIRS for two in END_PAIRS if one != two)

SPLITS = {"train": 200_000, "val": 2_000, "test": 2_560, "heldout": 640, "masks": 2_000}
SPLITS |= {"wide": 200_000, "wide-val": 2_000, "wide-test": 2_240}

HELD_OUT_LABELS = frozenset(PAIRS.index(pair) for pair in HELD_OUT_PAIRS)

_SEEDS = {"train": 1, "val": 2, "test": 3, "heldout": 4, "masks": 5, "wide": 6, "wide-val": 7, "wide-test": 8}
# Raise them with any change to what a scene shows or says: resumed runs compare them.
_VERSION, _WIDE_VERSION = "scenes-2", "wide-scenes-1"
_MIN_IMAGE_SIZE = 16

# Far apart from one another and from the grounds, which are all dark.
RGB = {
    "red": (214, 26, 34),
    "green": (24, 158, 52),
    "blue": (30, 70, 226),
    "yellow": (244, 224, 28),
    "purple": (142, 36, 178),
    "orange": (250, 132, 14),
    "white": (244, 244, 244),
    "cyan": (20, 205, 220),
}

_SPECKLES = 128  # a side of the cached noise, from which each scene takes its own window


class Scenes(Source):
    """Captioned pictures of coloured shapes.

    Splits: `train` and `val` have one or two things in a scene, of the 56 training pairs, and no labels.
    `test` has one thing a scene and all 64 classes in turn; `heldout` likewise but only the eight held-out
    pairs. Both are labelled with an index into the same 64 `class_names` ('red circle', ...);
    `heldout_labels` are those of the held-out pairs. `masks` has one or two things of all 64 pairs, no labels, and
    a mask of each picture: 0 the ground, 1 to 8 the shapes. Colours are no classes of it: a pixel alone tells them.
    `wide` to train on and `wide-val` for retrieval are pictures 4:1 and 1:4 as often, with one of the 56 training pairs
    at each end, no labels. `wide-test` is labelled with 112 classes ('red circle on the left and a blue heart on the
    right', ...), which no one end tells.

    Args:
        split: one of `SPLITS`.
        image_size: the short side of the pictures in pixels, at least 16; below 32 shapes are hard to tell.
        num_samples: how many scenes; by default as `SPLITS` says. The first scenes of a longer
            source equal those of a shorter one.

    Raises:
        UserError: an unknown split, or a size or a number out of range.
    """

    def __init__(self, split: str = "train", image_size: int = 48, num_samples: int | None = None) -> None:
        check_split("scenes", split, SPLITS)
        if image_size < _MIN_IMAGE_SIZE:
            raise UserError(f"scenes: image size {image_size} is too small; use {_MIN_IMAGE_SIZE} or more.")
        if num_samples is not None and num_samples < 1:
            raise UserError(f"scenes: num_samples is {num_samples}; use 1 or more.")
        self.split = split
        self.image_size = image_size
        self.name = f"scenes:{split}"
        self._length = SPLITS[split] if num_samples is None else num_samples
        self._wide, self.masked = split.startswith("wide"), split == "masks"
        self._classes = END_CLASSES if self._wide else PAIRS
        labelled = {"test": PAIRS, "heldout": HELD_OUT_PAIRS, "wide-test": END_CLASSES}.get(split, ())
        self._labels = tuple(map(self._classes.index, labelled))  # they come in turn
        if labelled:
            self.class_names = tuple(name_ends(*one) if self._wide else " ".join(one) for one in self._classes)
        if self._wide:
            self.templates = ("a(n) {}", "a picture of a(n) {}")
        else:
            self.heldout_labels = HELD_OUT_LABELS
        if self.masked:
            self.mask_names = ("background", *SHAPES)
            self.templates = tuple(f"a {colour} {{}}" for colour in COLOURS)  # no caption has a shape without one
        version = _WIDE_VERSION if self._wide else _VERSION
        self.fingerprint = fingerprint_of(f"{version} {split} {image_size} {self._length}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """The scene as a record: image uint8 (S, S, 3), of wide ones (S, 4 S, 3) or (4 S, S, 3), captions and label."""
        scene, draws = self._draw(index)
        if self._wide:
            whole, size = render(scene, SPREAD * self.image_size), self.image_size
            image = np.ascontiguousarray(whole[:size] if scene.relation == "left" else whole[:, :size])
        else:
            image = render(scene, self.image_size)
        return Record(
            key=f"{self.split}-{index:08d}",
            image=image,
            captions=self._word(scene, draws),
            label=self.label(index),
            mask=draw_mask(scene, self.image_size) if self.masked else None,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """Three to five wordings, the most detailed first, without rendering."""
        return self._word(*self._draw(index))

    def label(self, index: int) -> int | None:
        """The class index of a `test`, `heldout` or `wide-test` scene; None in the other splits."""
        index = check_index(self, index)
        return self._labels[index % len(self._labels)] if self._labels else None

    def describe(self, index: int) -> Scene:
        """What the scene shows: the description that picture and captions are made from."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Scene, Draws]:
        """The scene's description, and its random numbers from where the wording takes over."""
        label, draws = self.label(index), Draws(_SEEDS[self.split], index)
        shown = None if label is None else self._classes[label]
        if self._wide:
            return draw_ends(draws, *(shown or _any_ends(draws))), draws
        if shown is not None:
            return draw_single(draws, shown), draws
        return draw_any(draws, PAIRS if self.masked else TRAINING_PAIRS), draws

    def _word(self, scene: Scene, draws: Draws) -> tuple[str, ...]:
        return word_ends(scene, draws) if self._wide else word_scene(scene, draws)


def _any_ends(draws: Draws) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """The relation of the ends of a long picture, and two training pairs that differ."""
    relation, first = draws.choice(tuple(ENDS)), draws.choice(TRAINING_PAIRS)
    return relation, first, draws.choice([pair for pair in TRAINING_PAIRS if pair != first])


def render(scene: Scene, image_size: int) -> np.ndarray:
    """The scene as uint8 (image_size, image_size, 3) RGB."""
    # All arrays from here on are float32, and numbers of Python leave them so.
    tone = np.array(scene.backdrop.tone, dtype=np.float32).reshape(3, 1, 1)
    canvas = tone + _pattern(scene.backdrop, image_size) * scene.backdrop.contrast
    for thing in scene.things:
        rows, columns, cover = _cover(thing, image_size)
        ink = np.array(RGB[thing.colour], dtype=np.float32) + np.array(thing.tint, dtype=np.float32)
        area = canvas[:, rows, columns]
        area += cover * (ink.reshape(3, 1, 1) - area)
    np.clip(canvas, 0, 255, out=canvas)
    canvas += 0.5
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0))


def draw_mask(scene: Scene, image_size: int) -> np.ndarray:
    """The scene's classes as uint8 (image_size, image_size): 0, or 1 + the shape's place in SHAPES where its ink is
    at least half of the pixel that `render` draws."""
    mask = np.zeros((image_size, image_size), np.uint8)
    for thing in scene.things:
        rows, columns, cover = _cover(thing, image_size)
        mask[rows, columns][cover >= 0.5] = 1 + SHAPES.index(thing.shape)
    return mask


def _pattern(backdrop: Backdrop, size: int) -> np.ndarray:
    """How far each pixel departs from the tone, about -1..1; float32 (size, size)."""
    if backdrop.kind == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if backdrop.kind == "gradient":
        # Steep enough to be seen, yet no corner so light that a colour would fade into it.
        return _along(backdrop.angle, size) * 2.2
    if backdrop.kind == "noise":
        tile = _noise_tile(max(1, size // 24))
        room = tile.shape[0] - size + 1
        top, left = int(backdrop.shift_y * room), int(backdrop.shift_x * room)
        return tile[top : top + size, left : left + size]
    if backdrop.kind == "stripes":
        return _square_wave(_along(backdrop.angle, size), backdrop.period, backdrop.shift_x, size)
    # Checks are upright and a little coarser than stripes: turned or fine ones look like noise at this size.
    xs, period = _pixel_centres(size), 1.3 * backdrop.period
    rows, columns = (_square_wave(xs, period, shift, size) for shift in (backdrop.shift_y, backdrop.shift_x))
    return rows[:, None] * columns[None, :]


def _square_wave(position: np.ndarray, period: float, shift: float, image_size: int) -> np.ndarray:
    """A wave between -1 and 1 whose edges are one pixel wide."""
    wave = np.sin(position * (2 * math.pi / period) + 2 * math.pi * shift)
    wave *= period * image_size / math.pi
    return np.clip(wave, -1, 1, out=wave)


def _along(degrees: float, image_size: int) -> np.ndarray:
    """How far each pixel lies along the direction `degrees`, from the centre; float32 (size, size)."""
    steps = _pixel_centres(image_size) - 0.5
    radians = math.radians(degrees)
    return (steps * math.cos(radians))[None, :] + (steps * math.sin(radians))[:, None]


@lru_cache(maxsize=8)
def _pixel_centres(image_size: int) -> np.ndarray:
    return (np.arange(image_size, dtype=np.float32) + 0.5) / image_size


@lru_cache(maxsize=8)
def _noise_tile(speckle: int) -> np.ndarray:
    """Square speckles of `speckle` pixels, evenly spread over -1.3..1.3; float32, wider than the image."""
    raw = np.random.Philox(key=0).random_raw(_SPECKLES * _SPECKLES)
    coarse = ((raw >> 11) * 2.0**-53 * 2.6 - 1.3).astype(np.float32).reshape(_SPECKLES, _SPECKLES)
    return np.ascontiguousarray(coarse.repeat(speckle, axis=0).repeat(speckle, axis=1))


def _cover(thing: Thing, image_size: int) -> tuple[slice, slice, np.ndarray]:
    """Rows and columns about one thing, and its ink's share of each pixel there, 0 to 1, float32."""
    reach = thing.radius * 1.05 * image_size + 1
    x, y = thing.x * image_size, thing.y * image_size
    left, right = max(0, int(x - reach)), min(image_size, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(image_size, int(y + reach) + 1)
    centres = _pixel_centres(image_size)
    dx = (centres[left:right] - thing.x) / thing.radius
    dy = (thing.y - centres[top:bottom]) / thing.radius  # up, as the shapes want it
    cos, sin = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    u = (dx * cos)[None, :] + (dy * sin)[:, None]
    v = (dy * cos)[:, None] - (dx * sin)[None, :]
    # One pixel of blending around the edge.
    cover = 0.5 - _DISTANCES[thing.shape](u, v) * (thing.radius * image_size)
    return slice(top, bottom), slice(left, right), np.clip(cover, 0, 1, out=cover)


# Signed distances to shapes inside the unit disc or just about it: u to the right, v up, negative within.
# Exact near the edges, which is where they are read. After https://iquilezles.org/articles/distfunctions2d


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    # The union of two bars is what lies in the long reach of one side and the short reach of the other.
    return np.maximum(np.maximum(u, v) - 0.95, np.minimum(u, v) - 0.28)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v + 0.2  # the middle of the height, rather than the centroid, sits at the centre
    side = math.sqrt(3) / 2 * np.abs(u) + 0.5 * v
    return np.maximum(-v, side) - 0.53


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Fold the plane into one half of one of the five arms, then measure to that arm's edge.
    u = np.abs(u)
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    for across in (cos, -cos):
        beyond = 2 * np.maximum(u * across - v * sin, 0)
        u, v = u - beyond * across, v + beyond * sin
    inner = 0.42
    edge_u, edge_v = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5) - 1
    length = math.hypot(edge_u, edge_v)
    return (v - 1) * (edge_u / length) - np.abs(u) * (edge_v / length)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A square on its tip with a half disc on each of its two upper sides.
    u, v = np.abs(u) / 1.5, v / 1.5
    tip = (u + np.abs(v + 0.05) - 0.5) * math.sqrt(0.5)
    lobe = np.hypot(u - 0.25, v - 0.2) - math.sqrt(2) / 4
    return np.minimum(tip, lobe) * 1.5


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    outer = np.sqrt(u * u + v * v) - 0.98
    bite = np.hypot(u - 0.5, v) - 0.76
    return np.maximum(outer, -bite)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.sqrt(u * u + v * v) - 0.96,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.76) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
}
