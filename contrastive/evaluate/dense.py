"""What evaluations of single patches share: tokens and masks of a source, a batch at a time, nothing kept.

B images, P patches (h rows, w columns), D width, S side of the model's input in pixels, C classes. Native images have
a P, h and w of their own, and their masks likewise: what is done with patches is done picture by picture.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from contrastive.data.decode import IGNORED, decode, decode_mask
from contrastive.data.loader import eval_loader
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import BadSample, Record, Source
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import evaluating
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import EvaluationTask, Outcome
from contrastive.log import bar
from contrastive.models.image_encoder import ImageEncoder
from contrastive.patches import Patches, one_by_one

NUM_VALUES = 256
"""Of a mask's pixels. Counts are kept for all of them: which occur is known when all masks were read."""
BLOCK_ELEMENTS = 2**26
"""Numbers held at once: 256 MB of float32."""


@dataclass(frozen=True)
class DenseTask(EvaluationTask):
    """A task that reads pictures, or their masks, patch by patch; embeddings do not serve it."""

    reads_embeddings = False

    data: str
    ignore: tuple[int, ...] = (IGNORED,)
    """Values of the masks' pixels that do not count: 255, as VOC's borders; for ADE20k 0 too."""

    def check(self) -> None:
        if not all(0 <= value < NUM_VALUES for value in self.ignore):
            raise UserError(f"ignore is {list(self.ignore)}; values of masks go from 0 to {NUM_VALUES - 1}")

    def run(self, subject: EvaluatedModel) -> Outcome:
        subject.bundle.check_image_tower(f"{self.title} needs one")
        skipped: Counter[str] = Counter()
        with evaluating(subject.bundle.model):
            outcome = self.scored(subject, skipped)
        outcome.details["skipped"] = dict(+skipped)
        return outcome

    @abstractmethod
    def scored(self, subject: EvaluatedModel, skipped: Counter[str]) -> Outcome:
        """Evaluate, in eval mode and without gradients; count in `skipped` what is left out, by reason."""

    def counted(self, values: torch.Tensor) -> torch.Tensor:
        """Return which of these values of masks count, bool."""
        return ~torch.isin(values, torch.tensor(self.ignore, dtype=torch.uint8))

    def masked_source(self, subject: EvaluatedModel, data: str) -> Source:
        """Return the opened data; UserError where it has no masks."""
        source = subject.source(data)
        if not source.masked:
            raise UserError(
                f"{data} has no masks, which {self.title} needs: use scenes:masks, a folder of images/ and masks/, or "
                "a table with a column 'mask'"
            )
        return source


@dataclass(frozen=True)
class TokenTask(DenseTask):
    """A task on the patch tokens of one layer."""

    layer: int = -1
    """As `ImageEncoder` counts: -1 is the last block's output, 0 the first one's input."""
    norm: bool = True
    """Whether the tower's final LayerNorm follows, after whichever layer."""

    @property
    def features_title(self) -> str:
        return f"patch tokens, layer {self.layer}" + ("" if self.norm else ", not normalised")

    def encoder(self, subject: EvaluatedModel) -> ImageEncoder:
        """Return the tower up to the layer, (B, 3, S, S) to (B, P, D), or of Patches."""
        return ImageEncoder(subject.bundle.model.image_tower, self.layer, self.norm)


def dense_batches(
    subject: EvaluatedModel, source: Source, indices: np.ndarray, text: str, skipped: Counter[str], ignore=None
) -> Iterator[dict]:
    """Read the pictures at `indices`: batches of `eval_loader` with at least one.

    Beside 'image' they have 'picture' and 'mask', lists of the single pictures, uint8 (3, H, W), and masks, (H, W).

    Args:
        text: of the progress bar. skipped: counts what is left out, by reason.
        ignore: values of masks that may be there beside those named; None: read no masks.

    Raises:
        UserError: a mask of another size than its picture, or of values that are no classes; nothing that can be read.
    """
    read, preprocess, options = 0, subject.bundle.preprocess, subject.bundle.model.image_tower.config
    patches = preprocess.config.most_patches if options.native else options.num_patches
    size = min(subject.loading.get("batch_size", 256), max(1, BLOCK_ELEMENTS // (patches * NUM_VALUES)))
    more = None if ignore is None else partial(_read_mask, names=source.mask_names, ignore=ignore)
    loader = eval_loader(source, preprocess, indices, size, subject.loading.get("num_workers", 0), more=more)
    for batch in bar(loader, text, shown=subject.progress):
        skipped.update(reason for reason, _ in batch["bad"])
        # An error that a worker raised would come with its trace.
        if fault := next(filter(None, batch.get("fault", ())), None):
            raise UserError(f"{source.name}: {fault}")
        if len(batch["index"]):
            read += len(batch["index"])
            batch["picture"] = one_by_one(batch["image"])
            if more:
                batch["mask"] = one_by_one(batch["mask"], channels=1)
            yield batch
    if not read:
        raise UserError(f"{source.name}: none of its {len(indices):,} samples can be used ({dict(skipped)})")


def _read_mask(record: Record, preprocess: Preprocess, names, ignore) -> dict:
    if record.mask is None:
        raise BadSample("missing_mask", record.key)
    try:
        mask = decode_mask(record.mask, decode(record.image).shape[1:], names, ignore, record.key)
    except UserError as error:
        return {"mask": preprocess.mask(np.zeros((1, 1), np.uint8)), "fault": str(error)}
    return {"mask": preprocess.mask(mask), "fault": ""}


def to_tokens(encoder: ImageEncoder, subject: EvaluatedModel, images: torch.Tensor | Patches) -> torch.Tensor:
    """Return the patch tokens (B, P, D), float32, of uint8 pixels (B, 3, S, S); of Patches 0 behind an image's own."""
    return encoder(subject.bundle.preprocess.normalize(images.to(subject.device))).float()


def patch_counts(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """Return how many pixels of each patch have each value: (..., H, W) uint8 to (..., P, 256) int64."""
    blocks = masks.unfold(-2, patch, patch).unfold(-2, patch, patch).flatten(-2).flatten(-3, -2).long()  # (..., P, px)
    counts = blocks.new_zeros(*blocks.shape[:-1], NUM_VALUES)
    return counts.scatter_add_(-1, blocks, torch.ones_like(blocks))


def patch_centres(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """Return the value at the centre of each patch: (..., H, W) to (..., P), row by row."""
    return masks[..., patch // 2 :: patch, patch // 2 :: patch].flatten(-2)
