"""The right one of captions that share their words or nearly so: does a model read more than a bag of words?

Files of choices are laid out as SugarCrepe's or as Winoground's. N samples, E embed_dim.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from contrastive.data.record import BadSample, Record, Source
from contrastive.data.sources.paths import IMAGE_SUFFIXES, read_image_file
from contrastive.errors import UserError, did_you_mean
from contrastive.evaluate.embeddings import check_text_tower, embed_images, embed_texts, pick_indices
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import TASKS, EvaluationTask, Figure, Outcome, share_interval

ONE_IMAGE = ("filename", "caption", "negative_caption")
TWO_IMAGES = ("image_0", "image_1", "caption_0", "caption_1")
PAIR_CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}
"""Of four independent scores: two comparisons right, twice; and both right ones above both wrong ones."""


class CaptionChoice(NamedTuple):
    """One entry of the file.

    images: names of one file, or of two. captions: the right one first, then the wrong ones; or of two images the
    one that belongs to each.
    """

    key: str
    images: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether no caption is blank."""
        return all(caption.strip() for caption in self.captions)


@dataclass(frozen=True)
class ChoiceImages(Source):
    """The image files that choices name, as a source."""

    name: str
    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Return the file's bytes. Winoground leaves the ending away: the first kind of image there is counts."""
        file = self.files[index]
        names = (file, *(f"{file}.{suffix}" for suffix in IMAGE_SUFFIXES))
        path = next((path for path in (self.root / name for name in names) if path.is_file()), None)
        if path is None:
            raise BadSample("missing_image", file)
        return Record(file, read_image_file(str(path), file))


def compositional(
    bundle,
    spec_file: str | Path,
    *,
    device: str | torch.device,
    image_root: str | Path | None = None,
    limit: int | None = None,
    **loading,
) -> dict:
    """Score a model on a file of choices.

    Two layouts (see `read_choices`). One image, its caption and a wrong one or several (SugarCrepe, Hsieh et al.,
    2023): right when the caption is nearer to the image than every wrong one. Two images and two captions
    (Winoground, Thrush et al., 2022): 'text_score' when each image is nearer to its own caption than to the other,
    'image_score' when each caption is nearer to its own image, 'group_score' when both.

    Args:
        spec_file: .json or .jsonl.
        image_root: the folder that image names start from; that of the file when None.
        bundle, limit, loading: as of `zero_shot`.

    Returns:
        'acc1', or the three scores, in percent; 'chance' {name: percent}; 'num_samples'; 'skipped' {reason: count}:
        samples with an image that cannot be read or with a blank caption. And, which JSON cannot hold, 'hits':
        bool (N,), or (N, 3) with a column for each score.

    Ties and NaNs count against the model: one that embeds everything alike has 0 %.

    Raises:
        UserError: no text tower, a malformed file, or no sample left.

    With several ranks, call it on all of them; every rank returns the same.
    """
    check_text_tower(bundle, "a choice between captions")
    path = Path(spec_file).expanduser()
    choices = read_choices(path)
    choices = [choices[index] for index in pick_indices(len(choices), limit)]
    root = path.parent if image_root is None else Path(image_root).expanduser()
    complete = [choice for choice in choices if choice.complete]
    skipped = Counter({"missing_caption": len(choices) - len(complete)})
    files = ChoiceImages(str(path), root, _distinct(image for choice in complete for image in choice.images))
    embedded = embed_images(bundle.model, files, bundle.preprocess, device=device, **loading)
    reasons = {file: reason for reason, file in embedded.bad}
    faults = [next((reasons[image] for image in choice.images if image in reasons), None) for choice in complete]
    skipped.update(fault for fault in faults if fault)
    kept = [choice for choice, fault in zip(complete, faults, strict=True) if not fault]
    if not kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted((+skipped).items()))
        raise UserError(
            f"{path}: none of its {len(choices):,} samples can be used ({why}); images are sought in {root}"
        )
    texts = _distinct(caption for choice in kept for caption in choice.captions)
    text_features = embed_texts(bundle.model, bundle.tokenizer, texts, device=device)
    near = _nearness(embedded.keys, embedded.features, texts, text_features)
    chance, hits = (_scored_pairs if len(kept[0].images) == 2 else _scored_captions)(kept, near)
    figures = dict(zip(chance, (100 * hits.double().mean(dim=0)).view(-1).tolist(), strict=True))
    return {**figures, "chance": chance, "num_samples": len(kept), "skipped": dict(+skipped), "hits": hits}


Near = Callable[[Iterable[tuple[str, str]]], torch.Tensor]
"""How near image and caption of each pair of names are to each other (n,)."""


def _nearness(image_names: Sequence[str], images: torch.Tensor, text_names: Sequence[str], texts: torch.Tensor) -> Near:
    image_row, text_row = ({name: row for row, name in enumerate(names)} for names in (image_names, text_names))

    def near(pairs: Iterable[tuple[str, str]]) -> torch.Tensor:
        left, right = zip(*((image_row[image], text_row[text]) for image, text in pairs), strict=True)
        # Row by row alike, so that equal vectors tie exactly.
        return (images[list(left)] * texts[list(right)]).sum(dim=1)

    return near


def _scored_captions(choices: list[CaptionChoice], near: Near) -> tuple[dict[str, float], torch.Tensor]:
    """The chance level in percent, and hits (N,): the right caption strictly nearer than every wrong one."""
    right = near((choice.images[0], choice.captions[0]) for choice in choices)
    wrong = near((choice.images[0], text) for choice in choices for text in choice.captions[1:])
    counts = [len(choice.captions) - 1 for choice in choices]
    above = right.repeat_interleave(torch.tensor(counts)) > wrong
    hits = torch.stack([of_one.all() for of_one in above.split(counts)])
    chance = sum(100 / len(choice.captions) for choice in choices) / len(choices)
    return {"acc1": chance}, hits


def _scored_pairs(choices: list[CaptionChoice], near: Near) -> tuple[dict[str, float], torch.Tensor]:
    """Chance levels in percent, and hits (N, 3): text, image and group score of each."""
    own_0, own_1, cross_01, cross_10 = (
        near((choice.images[image], choice.captions[caption]) for choice in choices)
        for image, caption in ((0, 0), (1, 1), (0, 1), (1, 0))
    )
    text = (own_0 > cross_01) & (own_1 > cross_10)
    image = (own_0 > cross_10) & (own_1 > cross_01)
    return dict(PAIR_CHANCE), torch.stack([text, image, text & image], dim=1)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def read_choices(path: Path) -> list[CaptionChoice]:
    """Read a JSON file, {id: entry, ...} or a list of entries, or JSON lines; all entries of one layout.

    An entry has the fields of ONE_IMAGE ('negative_caption' may be a list of several) or those of TWO_IMAGES. A
    caption that is null counts as blank.

    Raises:
        UserError: no such file, not JSON, no entries, an id that comes twice, a missing field, or one that is no text.
    """
    try:
        text = path.expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON text ({error})") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        held = [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    else:
        held = _parsed(text, f"{path}")
    if isinstance(held, _Pairs):
        named = list(held)
    elif isinstance(held, list):
        named = [(str(dict(e).get("id", n)) if isinstance(e, _Pairs) else str(n), e) for n, e in enumerate(held)]
    else:
        raise UserError(f"{path}: must be a JSON object of entries by id, or a list of entries")
    if not named:
        raise UserError(f"{path} has no entries")
    twice = [key for key, times in Counter(key for key, _ in named).items() if times > 1]
    for key, entry in named:
        if not isinstance(entry, _Pairs):
            raise UserError(f"{path}, entry '{key}': must be a JSON object with the fields {', '.join(ONE_IMAGE)}")
    if twice:
        raise UserError(f"{path}: id '{twice[0]}' is there twice")
    entries = [(key, dict(entry)) for key, entry in named]
    layout = TWO_IMAGES if "image_0" in entries[0][1] else ONE_IMAGE
    return [_choice(entry, layout, f"{path}, entry '{key}'", key) for key, entry in entries]


class _Pairs(list):
    """The (name, value) pairs of a JSON object: a dict would keep the last of those with one name."""


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON text ({error})") from None


def _choice(entry: dict, layout: Sequence[str], where: str, key: str) -> CaptionChoice:
    missing = [name for name in layout if name not in entry]
    if missing:
        hint = did_you_mean(missing[0], entry)
        raise UserError(f"{where}: no field '{missing[0]}'; it needs {', '.join(layout)}.{hint}")
    num_images = 1 if layout is ONE_IMAGE else 2
    images = tuple(entry[name] for name in layout[:num_images])
    captions: list = []
    for name in layout[num_images:]:
        captions += entry[name] if name == "negative_caption" and isinstance(entry[name], list) else [entry[name]]
    captions = ["" if caption is None else caption for caption in captions]
    if len(captions) < 2:
        raise UserError(f"{where}: 'negative_caption' is an empty list; there is nothing to choose from")
    if not all(isinstance(text, str) for text in (*images, *captions)):
        raise UserError(f"{where}: {', '.join(layout)} have to be texts")
    return CaptionChoice(key, images, tuple(captions))


@TASKS.register("compositional")
@dataclass(frozen=True)
class Compositional(EvaluationTask):
    """The right of two captions that differ in one word or their order: SugarCrepe's and Winoground's layouts."""

    title = "compositional"
    reads_embeddings = False

    data: str
    """A JSON or JSONL file."""
    image_root: str | None = None
    """Folder of the images; none: that of the file."""

    def check(self) -> None:
        if not Path(self.data).expanduser().is_file():
            raise UserError(f"no file {self.data}")

    def run(self, subject: EvaluatedModel) -> Outcome:
        check_text_tower(subject.bundle, "the compositional choice")
        result = compositional(subject.bundle, self.data, image_root=self.image_root, **subject.reading)
        chance, count = result["chance"], result["num_samples"]
        names = list(chance)
        figures = {n: Figure(result[n], share_interval(result[n], count), chance[n]) for n in names}
        details = {n: v for n, v in result.items() if n not in (*names, "chance", "hits")}
        return Outcome(figures, tuple(names), details)
