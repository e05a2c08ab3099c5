"""Segmentation by frozen patch tokens: what a patch shows, by its nearest neighbours or by a linear classifier.

Fitted on patches of training pictures, scored on the pixels of others: the classes' probabilities are upsampled from
the patches to the model's input (bilinear), the highest wins, and each pixel that counts is compared with the mask
there. IoU of a class is hits / (pixels of it + pixels said to be - hits), over all pictures; classes that are neither
there nor said are left out of the mean (as in VOC and scikit-learn's jaccard_score).

N patches of the bank, D width, C classes, B images, h x w patches.
"""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.data.record import Source
from contrastive.errors import UserError
from contrastive.evaluate.dense import BLOCK_ELEMENTS, NUM_VALUES, TokenTask, dense_batches, patch_counts, to_tokens
from contrastive.evaluate.embeddings import pick_indices
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.linear_probe import SWEEP_TOLERANCE, VAL_SHARE
from contrastive.evaluate.logistic import MAX_ITERATIONS, LogisticProblem, fit_logistic
from contrastive.evaluate.probe_input import probe_device
from contrastive.evaluate.tasks import RESAMPLES, SEED, TASKS, Figure, Outcome, bounds
from contrastive.log import bar
from contrastive.models.image_encoder import ImageEncoder

DECADES = range(4, -5, -1)
"""Weight decays that are tried, 1e4 first."""

Scorer = Callable[[torch.Tensor], torch.Tensor]
"""Tokens (n, D) to scores (n, C)."""


class Bank(NamedTuple):
    """Patches of training pictures."""

    tokens: torch.Tensor
    """(N, D) float32, on the CPU."""
    shares: torch.Tensor
    """(N, C) float32: how much of the patch's pixels that count is of each class."""
    image: torch.Tensor
    """(N,) int64, the picture of each."""
    values: torch.Tensor
    """(C,) what the masks call the classes."""


@dataclass(frozen=True)
class Segmentation(TokenTask):
    """The class of each pixel, from frozen patch tokens."""

    train: str | None = None
    """Data whose patches are fitted on; none: a random half of the pictures of `data`, the others are scored."""
    patches: int = 50_000
    """Patches fitted on at most, as many of each picture, drawn at random."""

    @property
    def data_title(self) -> str:
        return self.data if self.train is None else f"{self.train} → {self.data}"

    def check(self) -> None:
        super().check()
        if self.patches < 1:
            raise UserError(f"patches is {self.patches}; use 1 or more")

    @abstractmethod
    def fit(self, bank: Bank, device: torch.device, progress: bool) -> tuple[Scorer, dict]:
        """Return what scores tokens, and details. Nothing of the scored pictures is known here."""

    def scored(self, subject: EvaluatedModel, skipped: Counter[str]) -> Outcome:
        encoder, (train, test) = self.encoder(subject), self._parts(subject)
        bank = self._bank(subject, encoder, *train, skipped)
        score, details = self.fit(bank, probe_device(subject.device), subject.progress)
        found = self._tallies(subject, encoder, *test, bank, score, skipped)
        figures = segmentation_figures(*found, test[0].mask_names)
        details |= {"num_patches": len(bank.tokens), "num_train_images": len(bank.image.unique())}
        grid = "native" if encoder.architecture.native else "×".join(map(str, encoder.grid_size))
        details |= {"num_test_images": len(found[0]), "grid": grid}
        return Outcome(figures, ("miou", "pixel_accuracy"), details)

    def _parts(self, subject: EvaluatedModel) -> tuple[tuple[Source, np.ndarray], tuple[Source, np.ndarray]]:
        source = self.masked_source(subject, self.data)
        if self.train is not None:
            train = self.masked_source(subject, self.train)
            if train.fingerprint == source.fingerprint:
                raise UserError(f"{self.train} is what is scored: give other data, or no train to halve {self.data}")
            if train.mask_names != source.mask_names:
                raise UserError(f"the masks of {self.train} and {self.data} name different classes; give both the same")
            return tuple((one, pick_indices(len(one), subject.limit)) for one in (train, source))
        indices = pick_indices(len(source), subject.limit)
        if len(indices) < 2:
            raise UserError(f"{self.data}: {len(indices)} picture; {self.title} needs some to fit and others to score")
        mixed = np.random.default_rng(SEED).permutation(indices)
        return tuple((source, np.sort(half)) for half in np.array_split(mixed, 2))

    def _bank(self, subject: EvaluatedModel, encoder: ImageEncoder, source, indices, skipped: Counter) -> Bank:
        most = -(-self.patches // len(indices))
        tokens, counts, image = [], [], []
        for batch in dense_batches(subject, source, indices, "patches to fit on", skipped, self.ignore):
            seen = to_tokens(encoder, subject, batch["image"]).cpu()
            for index, own, mask in zip(batch["index"].tolist(), seen, batch["mask"], strict=True):
                of_patch = self._counts(mask, encoder)
                places = (of_patch.sum(dim=1) > 0).nonzero()[:, 0].numpy()
                places = np.random.default_rng([SEED, index]).permutation(places)[:most]
                tokens.append(own[places])
                counts.append(of_patch[places].to(torch.int32))
                image.append(torch.full((len(places),), index))
        counts = torch.cat(counts)
        values = counts.sum(dim=0).nonzero()[:, 0]
        if len(values) < 2:
            told = f"all pixels of its masks are {values.tolist()}, beside those ignored ({list(self.ignore)})"
            raise UserError(f"{source.name}: {told}; a segmentation needs two classes")
        shares = counts[:, values].float()
        return Bank(torch.cat(tokens), shares / shares.sum(dim=1, keepdim=True), torch.cat(image), values)

    def _counts(self, mask: torch.Tensor, encoder: ImageEncoder) -> torch.Tensor:
        """(P, 256): pixels that count."""
        counts = patch_counts(mask, encoder.patch_size)
        counts[..., list(self.ignore)] = 0
        return counts

    def _tallies(self, subject, encoder, source, indices, bank: Bank, score: Scorer, skipped) -> np.ndarray:
        """`tally` of each scored picture, (M, 3, 256), and the same as if the shares of every patch were known."""
        tallies = []
        for batch in dense_batches(subject, source, indices, "pictures to score", skipped, self.ignore):
            tokens = to_tokens(encoder, subject, batch["image"])
            scores = score(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            for own, mask in zip(scores, batch["mask"], strict=True):
                counted = self.counted(mask)
                known = self._counts(mask, encoder).float()
                known /= known.sum(dim=1, keepdim=True).clamp(min=1)
                values = known.sum(dim=0).nonzero()[:, 0] if counted.any() else bank.values
                for each, of in ((own[: len(known)], bank.values), (known[:, values], values)):
                    said = labelled_pixels(each, of, encoder.patch_size, mask.shape)
                    tallies.append(tally(mask.long(), said, counted).numpy())
        return np.stack(tallies[::2]), np.stack(tallies[1::2])


@TASKS.register("segmentation_knn")
@dataclass(frozen=True)
class KnnSegmentation(Segmentation):
    """Votes of the nearest training patches, by cosine: each for the classes of its pixels, in their shares.

    As in "Towards In-context Scene Understanding" (Balazevic et al. 2023), section 3, without its augmentation; the
    weights are DINO's. Nothing is chosen: k and the temperature are as given.
    """

    title = "patch kNN segmentation"

    k: int = 20
    temperature: float = 0.07

    def check(self) -> None:
        super().check()
        if self.k < 1 or not self.temperature > 0:
            raise UserError(f"k is {self.k} and temperature {self.temperature}; both have to be positive")

    def fit(self, bank: Bank, device: torch.device, progress: bool) -> tuple[Scorer, dict]:
        if self.k > len(bank.tokens):
            raise UserError(f"k = {self.k} neighbours among {len(bank.tokens)} patches; give a smaller k")
        tokens, shares = F.normalize(bank.tokens, dim=1).to(device), bank.shares.to(device)
        size = max(1, BLOCK_ELEMENTS // max(len(tokens), self.k * shares.shape[1]))

        def votes(asked: torch.Tensor) -> torch.Tensor:
            similarity, nearest = (F.normalize(asked, dim=1) @ tokens.T).topk(self.k, dim=1)
            return ((similarity / self.temperature).softmax(dim=1)[:, None] @ shares[nearest])[:, 0]

        return lambda asked: torch.cat([votes(block) for block in asked.to(device).split(size)]), {}


@TASKS.register("segmentation_linear")
@dataclass(frozen=True)
class LinearSegmentation(Segmentation):
    """Logistic regression on patch tokens, each patch of the class that most of its pixels have.

    The weight decay goes down by decades as long as the cross-entropy falls on patches of a fifth of the training
    pictures. Not by accuracy, as in the linear probe: between patches the probabilities themselves decide.
    """

    title = "linear segmentation"

    def fit(self, bank: Bank, device: torch.device, progress: bool) -> tuple[Scorer, dict]:
        labels, num_classes = bank.shares.argmax(dim=1), len(bank.values)
        images = bank.image.unique()
        if len(images) < 2:
            raise UserError("one training picture has patches; linear segmentation needs others to choose its decay on")
        mixed = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))]
        held = torch.isin(bank.image, mixed[: max(1, round(VAL_SHARE * len(images)))])
        problem = LogisticProblem(bank.tokens[~held], labels[~held], num_classes, device)
        best, least = None, math.inf
        for power in bar(DECADES, "linear segmentation", shown=progress):
            probe = problem.fit([10.0**power], [best], max_iterations=MAX_ITERATIONS, tolerance=SWEEP_TOLERANCE)[0]
            loss = F.cross_entropy(probe.scores(bank.tokens[held]), labels[held]).item()
            if loss >= least:
                break
            best, least = probe, loss
        probe = fit_logistic(bank.tokens, labels, num_classes, best.weight_decay, start=best, device=device)
        told = {"weight_decay": best.weight_decay, "val_loss": least, "converged": probe.converged}
        return lambda asked: probe.scores(asked).softmax(dim=1), told


def labelled_pixels(scores: torch.Tensor, values: torch.Tensor, patch: int, size: tuple[int, int]) -> torch.Tensor:
    """Return the value of the highest score at each pixel: (P, C) to (H, W) int64, on the CPU.

    Args:
        values: (C,) of the classes. patch: side in pixels. size: H, W; between patches' centres scores are bilinear.
    """
    maps = scores.T.unflatten(1, (size[0] // patch, size[1] // patch))[None]
    return values[F.interpolate(maps, size=tuple(size), mode="bilinear")[0].argmax(dim=0).cpu()]


def tally(truth: torch.Tensor, said: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the pixels of each value, (3, 256) int64: that are of it, that are said to be, and that are both.

    Args:
        truth, said: int64 in 0..255. counted: bool; pixels that count. All of one shape.
    """
    truth, said = truth[counted], said[counted]
    return torch.stack([torch.bincount(of, minlength=NUM_VALUES) for of in (truth, said, truth[truth == said])])


def iou_of(tallies: np.ndarray) -> np.ndarray:
    """Return the IoU of each class in percent, NaN where it is neither there nor said: (..., 3, C) to (..., C)."""
    there, said, hit = np.moveaxis(tallies, -2, 0).astype(np.float64)
    union = there + said - hit
    return 100 * np.divide(hit, union, out=np.full(union.shape, np.nan), where=union > 0)


def segmentation_figures(tallies: np.ndarray, perfect: np.ndarray, names: Sequence[str] | None) -> dict[str, Figure]:
    """Return 'miou', 'pixel_accuracy', 'known_patches_miou' and 'iou_NAME' of each class that is there or said.

    Args:
        tallies: (M, 3, 256) of the scored pictures, `perfect`: as if what each patch shows were known, which says what
            the grid allows. names: of the classes, else their values are their names.

    Chance is the best that can be said without looking: everywhere the class that most pixels have. Intervals draw
    whole pictures.
    """
    total = tallies.sum(axis=0)
    seen = np.flatnonzero(total[0] + total[1])
    there = total[0, seen]
    shares, most = 100 * there / there.sum(), there.argmax()
    drawn = np.random.default_rng(SEED).multinomial(len(tallies), np.full(len(tallies), 1 / len(tallies)), RESAMPLES)
    each = (drawn.astype(float) @ tallies[..., seen].reshape(len(tallies), -1)).reshape(RESAMPLES, 3, -1)  # (R, 3, C)
    by_class, ious = iou_of(total[:, seen]), iou_of(each)
    hits = each[:, 2].sum(axis=1) / each[:, 0].sum(axis=1)
    chance = shares[most] / (there > 0).sum()
    known = np.nanmean(iou_of(perfect.sum(axis=0)))
    figures = {
        "miou": Figure(float(np.nanmean(by_class)), bounds(np.nanmean(ious, axis=1)), float(chance)),
        "pixel_accuracy": Figure(float(100 * total[2].sum() / there.sum()), bounds(100 * hits), float(shares[most])),
        "known_patches_miou": Figure(float(known)),
    }
    for place, value in enumerate(seen.tolist()):
        interval = bounds(ious[:, place][~np.isnan(ious[:, place])])
        guess = float(shares[most]) if place == most else 0.0
        figures[f"iou_{names[value] if names else value}"] = Figure(float(by_class[place]), interval, guess)
    return figures
