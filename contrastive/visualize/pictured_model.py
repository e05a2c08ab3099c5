"""What is pictured: a model with the images and texts given to it. Each thing is computed once, when asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.data.captions import caption_fault
from contrastive.data.preprocess import Preprocess
from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.paths import IMAGE_SUFFIXES, read_image_file
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.log import warn
from contrastive.models.image_tower import ImageTower
from contrastive.patches import Patches, one_by_one
from contrastive.visualize.representations import (
    Trace,
    evenly_spread,
    layer_index,
    patch_embeddings,
    patch_index,
    random_tower,
    text_similarity,
    trace,
)

MAX_SHOWN = 12
"""Images that are looked into patch by patch; whole embeddings are of all."""
MAX_DATA_TEXTS = 6
"""Texts out of the data in the heat maps; those asked for are all shown."""
MAX_CLASS_TEXTS = 12
"""A data set of more classes than that gives the captions of its images as texts, not its class names."""


@dataclass(frozen=True)
class Inputs:
    """Images as the model sees them, and what is known of them."""

    images: torch.Tensor | Patches
    """(B, 3, H, W) uint8, or Patches: resized and cropped, before normalisation."""
    names: tuple[str, ...]
    """B file names or keys."""
    texts: tuple[str, ...]
    """Texts asked for, else those of the data; may be empty."""
    own: tuple[int | None, ...]
    """Of each image the number of the text that belongs to it, where the data says so."""
    texts_of_data: bool
    """Whether the texts are those of the data."""

    @cached_property
    def canvas(self) -> torch.Tensor:
        """(B, 3, H, W) uint8: the images as they are drawn, native ones on white of the size that all fit on."""
        images = one_by_one(self.images)
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        return torch.stack([_on_canvas(image, (height, width), 255) for image in images])


@dataclass(frozen=True)
class PicturedModel:
    """A model in eval mode, and what it is shown. B images, S of them shown, T texts, H heads, P patches.

    Raises:
        UserError: the tower has no such layer or patch; before anything is computed.
    """

    name: str
    """Of the model, for titles."""
    model: nn.Module
    """DualEncoder, ImageClassifier or ImageModel."""
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    """None for a model without a text tower; `Absent`, which is false too, without its tokenizer."""
    inputs: Inputs
    layer: int | None = None
    """The block whose attention is shown; None: the last, or SigLIP's attention head where there is one."""
    query: tuple[int, int] | None = None
    """(row, column) of the patch whose attention is shown; None: the middle one."""

    def __post_init__(self):
        layer_index(self.tower, self.block)
        patch_index(self.grid, self.patch)

    @property
    def tower(self) -> ImageTower:
        return self.model.image_tower

    @property
    def block(self) -> int:
        """The block that is looked into, from 0."""
        return layer_index(self.tower, -1 if self.layer is None else self.layer)

    @property
    def block_name(self) -> str:
        return f"block {self.block + 1} of {len(self.tower.transformer.blocks)}"

    @property
    def shown(self) -> tuple[torch.Tensor, tuple[str, ...]]:
        """(S, 3, H, W) uint8, the first images as they are drawn, and their names."""
        return self.inputs.canvas[:MAX_SHOWN], self.inputs.names[:MAX_SHOWN]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that each image has which is shown."""
        images, patch = one_by_one(self.inputs.images[:MAX_SHOWN]), self.tower.config.patch_size
        rows, columns = (min(image.shape[side] // patch for image in images) for side in (1, 2))
        return rows, columns

    @property
    def patch(self) -> tuple[int, int]:
        """(row, column) of the patch whose attention is shown."""
        return self.query or (self.grid[0] // 2, self.grid[1] // 2)

    @cached_property
    def pixels(self) -> torch.Tensor | Patches:
        """(B, 3, H, W) normalised, or Patches, on the model's device."""
        return self.preprocess.normalize(self.inputs.images.to(self.tower.patch_embed.weight.device))

    @property
    def batches(self) -> list[torch.Tensor | Patches]:
        """`pixels` in parts."""
        return [self.pixels[start : start + 8] for start in range(0, len(self.pixels), 8)]

    @cached_property
    def patch_tokens(self) -> torch.Tensor:
        """(1, P, D) after the final norm, of all S images one behind the other."""
        return torch.cat([seen.patch_tokens for seen in self._traces], dim=1)

    @property
    def first_patches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, D) each, after the final norm, of the first image: an untrained tower's, and this one's."""
        pixels = one_by_one(self.pixels[:1])[0][None]
        return trace(self.untrained, pixels).patch_tokens[0], self._traces[0].patch_tokens[0]

    @cached_property
    @torch.no_grad()
    def image_features(self) -> torch.Tensor:
        """(B, E), unit length."""
        return torch.cat([self.model.encode_image(batch) for batch in self.batches])

    @cached_property
    @torch.no_grad()
    def text_features(self) -> torch.Tensor:
        """(T, E), unit length."""
        return self.model.encode_text(self.tokenizer(list(self.inputs.texts)).to(self.tower.patch_embed.weight.device))

    @cached_property
    def text_maps(self) -> tuple[torch.Tensor, tuple[str, ...]]:
        """(S, T', rows, columns) cosines of patches and the T' texts that are shown, and these texts."""
        texts, chosen = self.inputs.texts, list(range(len(self.inputs.texts)))
        if self.inputs.texts_of_data:  # those of the images that are shown come first
            own = [text for text in self.inputs.own[:MAX_SHOWN] if text is not None]
            chosen = sorted(list(dict.fromkeys([*own, *chosen]))[:MAX_DATA_TEXTS])
        patches = patch_embeddings(self.tower, self.patch_tokens)
        maps = text_similarity(patches, self.text_features[chosen])[0]
        return self.on_canvas(maps, torch.nan), tuple(texts[text] for text in chosen)

    @cached_property
    def untrained(self) -> ImageTower:
        """See `random_tower`."""
        return random_tower(self.tower, getattr(self.model.config, "init", "siglip"))

    @cached_property
    def _traces(self) -> tuple[Trace, ...]:
        """Of each image that is shown, by itself: the weights of all heads of a large grid fill the memory."""
        return tuple(trace(self.tower, pixels[None]) for pixels in one_by_one(self.pixels[:MAX_SHOWN]))

    def maps(self, of: Callable[[Trace], torch.Tensor]) -> torch.Tensor:
        """(1, ..., N) of each trace to (S, ..., rows, columns), times the number of tokens: uniform attention has 1.

        NaN is where a native image has no patch.
        """
        found = (of(seen)[0, ..., seen.num_prefix :] * seen.tokens.shape[1] for seen in self._traces)
        return self.on_canvas(torch.cat(list(found), dim=-1), torch.nan)

    def on_canvas(self, values: torch.Tensor, blank: float) -> torch.Tensor:
        """(..., P) of the patches of all S images to (S, ..., rows, columns) on the canvas, `blank` beside an image."""
        whole = [side // self.tower.config.patch_size for side in self.inputs.canvas.shape[2:]]
        grids = [seen.grid for seen in self._traces]
        parts = values.cpu().split([rows * columns for rows, columns in grids], dim=-1)
        return torch.stack(
            [_on_canvas(part.unflatten(-1, grid), whole, blank) for part, grid in zip(parts, grids, strict=True)]
        )


def _on_canvas(image: torch.Tensor, size: Sequence[int], blank: float) -> torch.Tensor:
    """(..., h, w) to (..., H, W): in the corner at the top left."""
    return F.pad(image, (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2]), value=blank)


class _Image(NamedTuple):
    name: str
    pixels: torch.Tensor | Patches
    text: str | None = None


def read_inputs(
    places: Sequence[str], preprocess: Preprocess, *, limit: int, texts: Sequence[str] | None = None
) -> Inputs:
    """Read the images that `places` name.

    Args:
        places: image files, folders of images, or data sources (see `open_source`).
        limit: of a folder or source so many images are taken, spread evenly over it.
        texts: None takes the texts of the data: the class names in a prompt where there are few classes, else the
            first caption of each image.

    Raises:
        UserError: nothing of that name, an image file that cannot be read, no image at all, or a text that is empty.
    """
    for text in texts or ():
        if caption_fault(text):
            raise UserError(f"--text '{text[:40]}': {caption_fault(text)}; give words, as --text 'a red circle'")
    images: list[_Image] = []
    offered: list[str] = []
    for place in places:
        found, class_texts = _read_place(place, preprocess, limit)
        images += found
        offered += class_texts or [image.text for image in found if image.text]
    offered = list(dict.fromkeys(offered if texts is None else texts))
    return Inputs(
        images=preprocess.collate([image.pixels for image in images]),
        names=tuple(image.name for image in images),
        texts=tuple(offered),
        own=tuple(offered.index(image.text) if image.text in offered else None for image in images),
        texts_of_data=texts is None,
    )


def _read_place(place: str, preprocess: Preprocess, limit: int) -> tuple[list[_Image], list[str]]:
    """Return the images of one place, and the texts of its classes where there are few."""
    path = Path(place).expanduser()
    files = image_files(path)
    if files:
        return [_read_file(files[place], preprocess) for place in evenly_spread(len(files), limit)], []
    if path.is_file() and path.suffix.lower() not in (".tar", ".csv", ".tsv", ".jsonl", ".parquet"):
        kinds = ", ".join(f".{suffix}" for suffix in IMAGE_SUFFIXES)
        raise UserError(f"{path} is not an image file ({kinds}), nor data that is read")
    source = open_source(place)
    announce(source)
    return _read_source(source, preprocess, limit)


def image_files(path: Path) -> list[Path]:
    """The image file that `path` is by its name, or the images right inside the folder; none where it is a data source.

    A folder whose images have captions beside them is one.
    """
    found = sorted(entry for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else [path]
    images = [entry for entry in found if entry.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES]
    captioned = path.is_dir() and any(image.with_suffix(".txt").exists() for image in images)
    return [] if captioned else images


def _read_file(path: Path, preprocess: Preprocess) -> _Image:
    try:
        return _Image(path.name, preprocess.pixels(read_image_file(str(path), str(path))))
    except BadSample as bad:
        if bad.reason == "missing_image":
            raise UserError(f"no image at {path}: no such file") from None
        raise UserError(f"{path} cannot be read as an image ({bad.reason}); give another file") from None


def _read_source(source: Source, preprocess: Preprocess, limit: int) -> tuple[list[_Image], list[str]]:
    class_texts = []
    if source.class_names and len(source.class_names) <= MAX_CLASS_TEXTS:
        template = default_templates(source)
        class_texts = [fill(template[:1], name)[0] for name in source.class_names]
    images = []
    for index in evenly_spread(len(source), limit):
        key = str(index)
        try:
            record = source[index]
            key = record.key
            images.append(_Image(key, preprocess.pixels(record.image), _own_text(record, class_texts)))
        except BadSample as bad:
            warn(f"{source.name}: image {bad.key or key} left out ({bad.reason})")
    if not images:
        raise UserError(f"{source.name}: none of the {limit} images tried can be read; contrastive inspect")
    return images, class_texts


def _own_text(record: Record, class_texts: list[str]) -> str | None:
    if class_texts:
        known = record.label is not None and 0 <= record.label < len(class_texts)
        return class_texts[record.label] if known else None
    return next((caption for caption in record.captions if not caption_fault(caption)), None)
