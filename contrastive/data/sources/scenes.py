"""`scenes`: rendered pictures of coloured shapes with captions, needing no files and no network.

Each scene is a pure function of (split, index). Eight of the 64 colour-shape pairs are never drawn nor named
in training, so that `heldout` measures whether a model composes what it learnt.
"""

import hashlib
import operator

from contrastive.data.record import Record, Source
from contrastive.data.sources.scene_layout import COLOURS, SHAPES, Draws, Scene, draw_any, draw_single, word_scene
from contrastive.data.sources.scene_render import render
from contrastive.errors import UserError, did_you_mean

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

SPLITS = {"train": 200_000, "val": 2_000, "test": 2_560, "heldout": 640}

HELD_OUT_LABELS = frozenset(PAIRS.index(pair) for pair in HELD_OUT_PAIRS)

_SEEDS = {"train": 1, "val": 2, "test": 3, "heldout": 4}
_VERSION = "scenes-2"  # raise it with any change to what a scene shows or says: resumed runs compare it
_MIN_IMAGE_SIZE = 16


class Scenes(Source):
    """Captioned pictures of coloured shapes.

    Splits: `train` and `val` have one or two things in a scene, of the 56 training pairs, and no labels.
    `test` has one thing a scene and all 64 classes in turn; `heldout` likewise but only the eight held-out
    pairs. Both are labelled with an index into the same 64 `class_names` ('red circle', ...);
    `heldout_labels` are those of the held-out pairs.

    Args:
        split: 'train', 'val', 'test' or 'heldout'.
        image_size: side of the square pictures in pixels, at least 16; below 32 shapes are hard to tell.
        num_samples: how many scenes; by default 200,000, 2,000, 2,560 and 640. The first scenes of a longer
            source equal those of a shorter one.

    Raises:
        UserError: an unknown split, or a size or a number out of range.
    """

    def __init__(self, split: str = "train", image_size: int = 48, num_samples: int | None = None) -> None:
        if split not in SPLITS:
            hint = did_you_mean(split, SPLITS)
            raise UserError(f"scenes: unknown split '{split}'; use one of {', '.join(SPLITS)}.{hint}")
        if image_size < _MIN_IMAGE_SIZE:
            raise UserError(f"scenes: image size {image_size} is too small; use {_MIN_IMAGE_SIZE} or more.")
        if num_samples is not None and num_samples < 1:
            raise UserError(f"scenes: num_samples is {num_samples}; use 1 or more.")
        self.split = split
        self.image_size = image_size
        self.name = f"scenes:{split}"
        self._length = SPLITS[split] if num_samples is None else num_samples
        self._labelled_pairs = {"test": PAIRS, "heldout": HELD_OUT_PAIRS}.get(split)
        self.class_names = tuple(" ".join(pair) for pair in PAIRS) if self._labelled_pairs else None
        self.heldout_labels = HELD_OUT_LABELS
        identity = f"{_VERSION} {split} {image_size} {self._length}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """The scene as a record: image uint8 (image_size, image_size, 3), captions, and label or None."""
        scene, draws = self._draw(index)
        return Record(
            key=f"{self.split}-{index:08d}",
            image=render(scene, self.image_size),
            captions=word_scene(scene, draws),
            label=self.label(index),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """Three to five wordings, the most detailed first, without rendering."""
        return word_scene(*self._draw(index))

    def label(self, index: int) -> int | None:
        """The class index of a `test` or `heldout` scene; None in `train` and `val`."""
        index = self._checked(index)
        if self._labelled_pairs is None:
            return None
        return PAIRS.index(self._labelled_pairs[index % len(self._labelled_pairs)])

    def describe(self, index: int) -> Scene:
        """What the scene shows: the description that picture and captions are made from."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Scene, Draws]:
        """The scene's description, and its random numbers from where the wording takes over."""
        index = self._checked(index)
        draws = Draws(_SEEDS[self.split], index)
        if self._labelled_pairs is None:
            return draw_any(draws, TRAINING_PAIRS), draws
        return draw_single(draws, self._labelled_pairs[index % len(self._labelled_pairs)]), draws

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name}: index {index} is outside 0..{self._length - 1}")
        return index
