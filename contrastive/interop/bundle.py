"""A loaded model with all that belongs to it."""

from dataclasses import dataclass
from pathlib import Path

from contrastive.data.preprocess import Preprocess
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageModel,
    ImageModelConfig,
    ModelConfig,
    TextModel,
    TextModelConfig,
)


class Absent:
    """Stands for a part that a folder should have and has not: any use of it is a UserError that says so."""

    def __init__(self, message: str):
        self._message = message

    def __call__(self, *args, **kwargs):
        raise UserError(self._message)

    def __getattr__(self, name: str):
        if name.startswith("_"):  # what copy, pickle and torch ask of any object
            raise AttributeError(name)
        raise UserError(self._message)


NOT_LOADED = Absent("the tokenizer was not asked for; contrastive.load(PATH) loads it")


@dataclass(frozen=True)
class Bundle:
    """A model with all that belongs to it."""

    model: DualEncoder | ImageClassifier | ImageModel | TextModel
    preprocess: Preprocess | Absent | None
    """PIL image to (3, H, W) float32; None for a text tower alone."""
    tokenizer: Tokenizer | Absent | None
    """List of str to (B, context_length) int64; None without a text tower."""
    config: ModelConfig | ClassifierConfig | ImageModelConfig | TextModelConfig
    path: Path
    class_names: tuple[str, ...] | None = None
    """Of a classifier, in the order of its scores, where its data named them."""

    def check_text_tower(self, purpose: str) -> None:
        """Raise UserError where there is no text tower; `purpose` says in the message what needs one."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no text tower: {purpose}")

    def check_image_tower(self, purpose: str) -> None:
        """Raise UserError where there is no image tower; `purpose` says in the message what needs one."""
        if self.preprocess is None:
            raise UserError(f"{self.path} has no image tower: {purpose}")
