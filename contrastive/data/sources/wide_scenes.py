"""`scenes:wide`: pictures four times as wide as high, or as high as wide, with a thing at either end.

A caption is true of one picture only with both ends. Squares squash the things in one direction in half of the
pictures and in the other in the rest; images in their own aspect (model.image.native) show them as they are.
"""

import numpy as np

from contrastive.data.record import Record, Source, check_index, check_split, fingerprint_of
from contrastive.data.sources.scene_layout import ENDS, SPREAD, Draws, Scene, draw_ends, name_ends, word_ends
from contrastive.data.sources.scenes import TRAINING_PAIRS, render

SPLITS = {"wide": 200_000, "wide-val": 2_000, "wide-test": 2_240}
# Which are told apart at each end: by neither colour nor shape alone.
TESTED = tuple((colour, shape) for colour in ("red", "blue") for shape in ("circle", "square", "heart", "crescent"))
CLASSES = tuple((relation, one, two) for relation in ENDS for one in TESTED for two in TESTED if one != two)

_SEEDS = {"wide": 6, "wide-val": 7, "wide-test": 8}
_VERSION = "wide-scenes-1"  # raise it with any change to what a scene shows or says


class WideScenes(Source):
    """Captioned pictures, 4:1 and 1:4 as often, with one of the 56 training pairs of `Scenes` at each end.

    Splits: `wide` to train on and `wide-val` for retrieval have no labels. `wide-test` is labelled with 112 classes
    ('red circle on the left and a blue heart on the right', ...), which no one end tells.

    Args:
        split: 'wide', 'wide-val' or 'wide-test'.
        image_size: the short side in pixels.
    """

    templates = ("a(n) {}", "a picture of a(n) {}")

    def __init__(self, split: str = "wide", image_size: int = 48) -> None:
        check_split("scenes", split, SPLITS)
        self.split, self.image_size, self.name = split, image_size, f"scenes:{split}"
        self.class_names = tuple(name_ends(*one) for one in CLASSES) if split == "wide-test" else None
        self.fingerprint = fingerprint_of(f"{_VERSION} {split} {image_size} {len(self)}")

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __getitem__(self, index: int) -> Record:
        """The scene as a record: image uint8 (S, 4 S, 3) or (4 S, S, 3), captions, and label or None."""
        scene, draws = self._draw(index)
        whole, size = render(scene, SPREAD * self.image_size), self.image_size
        image = np.ascontiguousarray(whole[:size] if scene.relation == "left" else whole[:, :size])
        return Record(f"{self.split}-{index:08d}", image, word_ends(scene, draws), self.label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return word_ends(*self._draw(index))

    def label(self, index: int) -> int | None:
        index = check_index(self, index)
        return index % len(CLASSES) if self.class_names else None

    def _draw(self, index: int) -> tuple[Scene, Draws]:
        label, draws = self.label(index), Draws(_SEEDS[self.split], index)
        if label is not None:
            return draw_ends(draws, *CLASSES[label]), draws
        relation, first = draws.choice(tuple(ENDS)), draws.choice(TRAINING_PAIRS)
        second = draws.choice([pair for pair in TRAINING_PAIRS if pair != first])
        return draw_ends(draws, relation, first, second), draws
