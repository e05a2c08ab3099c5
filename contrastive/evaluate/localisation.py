"""Where things are, by single patches: the same place in two views of a picture, and the pointing game.

B images, P patches (h rows, w columns), D width, S side of the model's input in pixels, T texts.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.data.preprocess import resize
from contrastive.data.prompts import default_templates
from contrastive.data.record import Source
from contrastive.errors import UserError
from contrastive.evaluate.classification import zero_shot_classifier
from contrastive.evaluate.dense import BLOCK_ELEMENTS, DenseTask, TokenTask, dense_batches, patch_centres, to_tokens
from contrastive.evaluate.embeddings import pick_indices
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import SEED, TASKS, Figure, Outcome, clustered_interval
from contrastive.models.image_tower import ImageTower
from contrastive.patches import Patches
from contrastive.visualize.representations import patch_embeddings, reading_attention, text_similarity, trace

READ_BY = {
    "class": "the class token in the last block",
    "attention": "the pooling head's probe",
    "average": "all patches in the last block, on average: this pooling has no attention of its own",
}


class View(NamedTuple):
    """A part of a picture, enlarged to the whole, and mirrored or not; in pixels."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def of(self, pixels: torch.Tensor, kernel) -> torch.Tensor:
        """Return what is seen of uint8 (3, H, W), as large."""
        cut = pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]
        seen = resize(cut, *pixels.shape[1:], kernel)
        return seen.flip(2) if self.mirrored else seen

    def places(self, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """Return where the centres of the view's patches lie in the whole picture (P, 2): row and column, in patches.

        0 is the centre of the first patch.
        """
        rows, columns = ((torch.arange(count) + 0.5) / count for count in grid)  # 0..1 of the view
        columns = 1 - columns if self.mirrored else columns
        rows = (self.top + rows * self.height) * grid[0] / size[0] - 0.5
        columns = (self.left + columns * self.width) * grid[1] / size[1] - 0.5
        return torch.cartesian_prod(rows, columns)


def draw_view(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> View:
    """Draw a part of the picture's own shape that keeps a share of its area between the two of `scale`."""
    side = rng.uniform(*scale) ** 0.5
    kept = max(1, round(side * height)), max(1, round(side * width))
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip((height, width), kept, strict=True))
    return View(top, left, *kept, bool(rng.random() < 0.5))


@TASKS.register("correspondence")
@dataclass(frozen=True)
class Correspondence(TokenTask):
    """Each patch of a random crop, half of them mirrored, by its nearest patch (cosine) of the whole picture.

    Right within one patch of where its centre comes from, along both sides: PCK with a threshold of a patch. Any
    pictures will do; where there are masks, patches whose centre is on an object (not 0) are told apart: on a plain
    ground there is nothing to know a place by.
    """

    title = "correspondence"

    scale: tuple[float, float] = (0.3, 0.8)
    """Least and largest share of the area that a crop keeps."""

    def check(self) -> None:
        super().check()
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale is {list(self.scale)}; it has to be of the form 0 < low <= high <= 1")

    def scored(self, subject: EvaluatedModel, skipped: Counter[str]) -> Outcome:
        source, encoder = subject.source(self.data), self.encoder(subject)
        ignore = self.ignore if source.masked else None
        kernel, rows = subject.bundle.preprocess.config.interpolation, []
        indices = pick_indices(len(source), subject.limit)
        for batch in dense_batches(subject, source, indices, self.title, skipped, ignore):
            pictures, indices_of = batch["picture"], batch["index"].tolist()
            views = [
                draw_view(*picture.shape[1:], self.scale, np.random.default_rng([SEED, index]))
                for index, picture in zip(indices_of, pictures, strict=True)
            ]
            seen = [view.of(picture, kernel) for view, picture in zip(views, pictures, strict=True)]
            together = [Patches.of(one, encoder.patch_size) for one in seen] if encoder.architecture.native else seen
            both = batch["image"], subject.bundle.preprocess.collate(together)
            whole, part = (F.normalize(to_tokens(encoder, subject, each), dim=2) for each in both)
            for row, view in enumerate(views):
                size = pictures[row].shape[1:]
                grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
                places = view.places(grid, size)
                objects = torch.zeros(len(places), dtype=torch.bool)
                if source.masked:
                    objects = self._on_objects(batch["mask"][row], places, grid)
                nearest = (part[row, : len(places)] @ whole[row, : len(places)].T).argmax(dim=1).cpu()
                rows.append(_found(nearest, places, grid, indices_of[row], objects))
        found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return _matched(found)

    def _on_objects(self, mask: torch.Tensor, places: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(P,) bool: whether the mask (S, S) has an object at the places (P, 2)."""
        pixels = [((places[:, side] + 0.5) * mask.shape[side] / grid[side]).long() for side in (0, 1)]
        values = mask[pixels[0].clamp(max=mask.shape[0] - 1), pixels[1].clamp(max=mask.shape[1] - 1)]
        return self.counted(values) & (values != 0)


def _matched(found: dict[str, np.ndarray]) -> Outcome:
    """The figures of `_found` of all pictures, and of their objects alone where there are some."""
    chosen = {"": np.ones(len(found["image"]), bool), "_on_objects": found["objects"]}
    figures = {}
    for name in ("within_1_patch", "same_patch"):
        for where, rows in chosen.items():
            if rows.any():
                columns = (found[key][rows] for key in (name, f"{name}_chance", "image"))
                figures[name + where] = _share_of_hits(*columns)
    headline = tuple(name for name in figures if name.startswith("within"))
    return Outcome(figures, headline, {"num_images": len(np.unique(found["image"]))})


def _found(nearest: torch.Tensor, places: torch.Tensor, grid, image: int, objects: torch.Tensor) -> dict:
    """Of each patch (P,) whether the patch found is right, and how likely one drawn at random were."""
    centres = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float32) for count in grid))
    apart = (places[:, None] - centres).abs().amax(dim=2)  # (P, P), in patches
    found = {"image": np.full(len(places), image), "objects": objects.numpy()}
    for name, most in (("within_1_patch", 1.0), ("same_patch", 0.5)):
        right = apart <= most + 1e-4  # places are sums of float32
        found[name] = right.gather(1, nearest[:, None])[:, 0].numpy()
        found[f"{name}_chance"] = right.float().mean(dim=1).numpy()
    return found


@TASKS.register("pointing")
@dataclass(frozen=True)
class Pointing(DenseTask):
    """Does the patch that the pooling attends to most lie on an object; and the one most like a text on what it names?

    The pointing game of "Top-down Neural Attention by Excitation Backprop" (Zhang et al. 2016) by patches: a hit has
    the object's mask at its centre. Value 0 is the ground. By text each class that is there is asked for by its
    prompts, in the space that images and texts share (see `patch_embeddings`); this needs a text tower and names of the
    classes. What covers no patch's centre is not asked for.
    """

    title, features_title = "pointing game", "attention of the pooling, cosine of patch and text"

    def scored(self, subject: EvaluatedModel, skipped: Counter[str]) -> Outcome:
        source, tower = self.masked_source(subject, self.data), subject.bundle.model.image_tower
        texts = _class_texts(subject, source)
        found: dict[str, list[tuple[float, float, int]]] = {"by_attention": [], "by_text": []}
        indices = pick_indices(len(source), subject.limit)
        for batch in dense_batches(subject, source, indices, self.title, skipped, self.ignore):
            alike = [one[None] for one in batch["picture"]] if tower.config.native else [batch["image"]]
            pixels = (subject.bundle.preprocess.normalize(images.to(subject.device)) for images in alike)
            maps = (pair for images in pixels for pair in zip(*pointing_maps(tower, images, texts), strict=True))
            for index, mask, (attended, similar) in zip(batch["index"].tolist(), batch["mask"], maps, strict=True):
                at = patch_centres(mask, tower.config.patch_size)
                counted = self.counted(at)
                at, attended, similar = at[counted], attended[counted], similar[:, counted]
                things = [value for value in at.unique().tolist() if value]
                if things:
                    found["by_attention"].append((*_pointed(attended, at > 0), index))
                if texts is not None:
                    found["by_text"] += [(*_pointed(similar[thing], at == thing), index) for thing in things]
        if not found["by_attention"]:
            raise UserError(f"{source.name}: no patch of its pictures has an object (a value above 0) at its centre")
        figures = {}
        for name, rows in found.items():
            if rows:
                figures[name] = _share_of_hits(*map(np.array, zip(*rows, strict=True)))
        asked = {f"num_{name}": len(rows) for name, rows in found.items()}
        return Outcome(figures, tuple(figures), {"read_by": READ_BY[tower.config.pool], **asked})


def _share_of_hits(hits: np.ndarray, chances: np.ndarray, images: np.ndarray) -> Figure:
    """The figure of (n,) hits, each with its chance of being one, of these images."""
    return Figure(100 * float(hits.mean()), clustered_interval(hits, images), 100 * float(chances.mean()))


def _pointed(values: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Whether the highest of (P,) values is where `right` (P,) is true, and the share of patches where it is."""
    return float(right[values.argmax()]), float(right.float().mean())


def _class_texts(subject: EvaluatedModel, source: Source) -> torch.Tensor | None:
    """(C, E) embeddings of what the masks' values are called; None without names, or without a text tower."""
    if not source.mask_names or not subject.bundle.tokenizer:
        return None
    templates = default_templates(source, source.mask_names)
    model, tokenizer = subject.bundle.model, subject.bundle.tokenizer
    return zero_shot_classifier(model, tokenizer, source.mask_names, templates, device=subject.device)


def pointing_maps(
    tower: ImageTower, pixels: torch.Tensor, texts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of the pooling (B, P), heads averaged, and cosines with `texts` (B, T, P); T is 0 without any.

    Call it without gradients. Pictures go through in blocks: the weights of all heads of large grids fill the memory.
    """
    config, patches = tower.config, pixels.shape[-2] * pixels.shape[-1] // tower.config.patch_size**2
    of_one = patches * max(config.num_heads * patches, config.depth * config.width)
    attention, similarity = [], []
    for block in pixels.split(max(1, BLOCK_ELEMENTS // of_one)):
        seen = trace(tower, block)
        attention.append(reading_attention(tower, seen).mean(dim=1)[:, seen.num_prefix :].cpu())
        if texts is not None:
            similarity.append(text_similarity(patch_embeddings(tower, seen.patch_tokens), texts).cpu())
    attention = torch.cat(attention)
    return attention, torch.cat(similarity) if similarity else attention.new_empty(len(attention), 0, patches)
