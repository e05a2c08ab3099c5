"""Training samples, pairs or labelled images, as a pure function of their position; a bad one is replaced, and told."""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from contrastive.data.augment import AugmentConfig, augment
from contrastive.data.captions import caption_fault, caption_id, drawn_order
from contrastive.data.extras import DrawnSample, Extra
from contrastive.data.order import DRAWS, PATCHES, SampleOrder, philox
from contrastive.data.preprocess import NativeSize
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.patches import Patches

MAX_ATTEMPTS = 100

Captions = tuple[str, ...]  # of one sample
Faults = list[tuple[str, str]]  # (reason, key) of each sample or caption that could not be used
Size = int | NativeSize  # S in pixels, or that of native images
ImageSize = Size | Callable[[int], Size]  # or that of the samples of a step


class DrawnSize(NamedTuple):
    """The size of native images at a step, drawn from (seed, step): the same on all ranks and after a restart."""

    patch_size: int
    choices: tuple[int, ...]
    """The most patches of an image, of which one is drawn for a step, all equally likely."""
    seed: int

    def __call__(self, step: int) -> NativeSize:
        word = int(philox(self.seed, step, PATCHES).random_raw())
        return NativeSize(self.patch_size, self.choices[word % len(self.choices)])

    def __str__(self) -> str:
        """'native, up to 64, 128 or 256 patches of 16 px, drawn for each step'."""
        *some, last = map(str, sorted(set(self.choices)))
        drawn = f"{', '.join(some)} or {last}" if some else last
        return f"native, up to {drawn} patches of {self.patch_size} px{', drawn for each step' if some else ''}"


class SampleDataset(Dataset, ABC):
    """Samples by position (see SampleOrder), for `train_loader`. What a sample holds is up to the subclasses.

    All draws (of the variation of the image, of the stand-in for a bad sample) depend on the seed of the order and the
    position alone, so neither workers nor ranks nor a restart change a sample; and so does its size.
    """

    def __init__(
        self,
        source: Source,
        order: SampleOrder,
        image_size: ImageSize,
        augment: AugmentConfig,
        extras: Sequence[Extra] = (),
    ):
        if len(source) != order.num_samples:
            raise ValueError(f"the order is for {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order = source, order
        self.image_size, self.augment, self.extras = image_size, augment, extras

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the sample at `position`: image uint8 (3, S, S), varied, and what `sample` and the extras add.

        A native image is Patches, and patches, int, how many there may be of it at most.

        index: int, the place in the source. replaced: how many samples could not be used before this one.
        bad: (reason, key) of what was met and passed over.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row were bad.
        """
        index, bad, size, extras = self.order.index_of(position), [], self.image_size, ()
        if callable(size) or self.extras:
            step = self.order.step_of(position)
            size = size(step) if callable(size) else size
            extras = [extra for extra in self.extras if step >= extra.first_step]
        for attempt in range(MAX_ATTEMPTS):
            rng, key = np.random.Generator(philox(self.order.seed, position, DRAWS, attempt)), ""
            if attempt:  # with draws of its own: what was drawn for the bad sample says nothing about its stand-in
                index = self.order.stand_in(position, rng.random(), attempt)
            try:
                record = self.source[index]
                key = record.key
                added, captions = self.sample(record, rng, bad)
                place = position, attempt
                image, more = self._varied(record, index, captions, size, rng, extras, place, bad)
                more |= {"patches": size.most} if isinstance(size, NativeSize) else {}
                return {"image": image, **added, **more, "index": index, "replaced": attempt, "bad": bad}
            except BadSample as fault:
                bad.append((fault.reason, fault.key or key))
        reason, key = bad[-1]
        raise UserError(
            f"{MAX_ATTEMPTS} samples in a row could not be used, the last for {reason} ('{key}'); "
            f"check the data in '{self.source.name}'"
        )

    def _varied(
        self,
        record: Record,
        index: int,
        captions: Captions,
        size: Size,
        rng: np.random.Generator,
        extras: Sequence[Extra],
        place: tuple[int, int],
        bad: Faults,
    ) -> tuple[torch.Tensor | Patches, dict[str, Any]]:
        """Return the varied image, and what the extras add, each with draws of its own from (position, attempt)."""
        if not extras:
            return augment(record.image, size, self.augment, rng), {}
        position, attempt = place
        own = [np.random.Generator(philox(self.order.seed, position, extra.stream, attempt)) for extra in extras]
        given = (extra.draws(index, one) for extra, one in zip(extras, own, strict=True))
        rng = next((one for one in given if one is not None), rng)
        start, added = copy.deepcopy(rng), {}
        image = augment(record.image, size, self.augment, rng)
        seen = {size: image}

        def view(size: int) -> torch.Tensor:
            if size not in seen:
                seen[size] = augment(record.image, size, self.augment, copy.deepcopy(start))
            return seen[size]

        for extra, one in zip(extras, own, strict=True):
            made = extra.of(DrawnSample(record, index, captions, one, size, view, bad))
            added |= {f"{extra.name}.{key}": value for key, value in made.items()}
        return image, added

    @abstractmethod
    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> tuple[dict[str, Any], Captions]:
        """Return what the model needs of a record beside its image, and the texts that this is made of.

        BadSample where it cannot be used.
        """


class LabelledDataset(SampleDataset):
    """Images with the class they are of: image uint8 (3, S, S) and label, int in 0..num_classes-1."""

    def __init__(
        self, source: Source, order: SampleOrder, image_size: ImageSize, augment: AugmentConfig, num_classes: int
    ):
        super().__init__(source, order, image_size, augment)
        self.num_classes = num_classes

    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> tuple[dict[str, Any], Captions]:
        if record.label is None:
            raise BadSample("missing_label", record.key)
        if not 0 <= record.label < self.num_classes:
            raise BadSample("bad_label", record.key)
        return {"label": record.label}, ()


class PairDataset(SampleDataset):
    """Image-text pairs by position: image uint8 (3, S, S), tokens int64 (context_length,) and caption_id, int.

    caption_id is the hash of the text that is tokenized, or of the record's `caption_group`. With K > 1 captions of
    an image at once, tokens are (K, context_length) and caption_id is int64 (K,).

    Args:
        caption_templates: one is drawn for each caption, and '{}' in it becomes the caption.
        captions_per_image: K; an image with fewer shows some of them again.
        spread_captions: draw the k-th of the K from the k-th K-th of the weights, instead of all that follow the first.
        token_dropout: share of the tokens that are left out of each.
    """

    def __init__(
        self,
        source: Source,
        order: SampleOrder,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        augment: AugmentConfig,
        caption_templates: tuple[str, ...] = ("{}",),
        captions_per_image: int = 1,
        token_dropout: float = 0.0,
        extras: Sequence[Extra] = (),
        spread_captions: bool = False,
    ):
        super().__init__(source, order, image_size, augment, extras)
        self.tokenizer, self.spread_captions = tokenizer, spread_captions
        self.caption_templates, self.captions_per_image = caption_templates, captions_per_image
        self.token_dropout = token_dropout

    def sample(self, record: Record, rng: np.random.Generator, bad: Faults) -> tuple[dict[str, Any], Captions]:
        drawn = self._draw_captions(record, rng, bad)
        captions = [self.tokenizer.cleaned(caption) for caption in drawn]
        tokens = self.tokenizer.tokenize_clean(captions)
        if self.token_dropout:
            tokens = self._without_some(tokens, rng)
        ids = [caption_id(record.caption_group or caption) for caption in captions]
        if self.captions_per_image == 1:
            return {"tokens": tokens[0], "caption_id": ids[0]}, drawn
        return {"tokens": tokens, "caption_id": torch.tensor(ids)}, drawn

    def _draw_captions(self, record: Record, rng: np.random.Generator, bad: Faults) -> Captions:
        """Draw the captions of one sample, and put each in a template.

        An unusable one is noted and the next one taken, so that the image is not lost with it.
        """
        faults, usable, orders = [], [], self.captions_per_image if self.spread_captions else 1
        for number in range(orders):
            most = self.captions_per_image * (number + 1) // orders
            for caption in drawn_order(record, (number + rng.random()) / orders):
                if len(usable) == most:
                    break
                fault = caption_fault(caption) or caption_fault(self.tokenizer.cleaned(caption))
                if fault is not None:
                    faults.append(fault)
                elif orders == 1 or caption not in usable:
                    usable.append(caption)
        if not usable:
            raise BadSample(faults[0], record.key)
        bad.extend((fault, record.key) for fault in faults[:1])
        drawn, templates = [], self.caption_templates
        for _, caption in zip(range(self.captions_per_image), itertools.cycle(usable), strict=False):
            # Nothing is drawn where there is nothing to choose.
            template = templates[int(rng.random() * len(templates))] if len(templates) > 1 else templates[0]
            drawn.append(template.replace("{}", caption))
        return tuple(drawn)

    def _without_some(self, tokens: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Leave tokens (K, L) out at random, but not the first, the end or padding; the others move up."""
        pad_id, eos_id = self.tokenizer.pad_id, self.tokenizer.eos_id
        dropped = torch.from_numpy(rng.random(tokens.shape) < self.token_dropout)
        dropped[:, 0] = False
        dropped &= (tokens != eos_id) & (tokens != pad_id)
        kept_first = dropped.to(torch.uint8).sort(dim=1, stable=True).indices
        return tokens.masked_fill(dropped, pad_id).gather(1, kept_first)
