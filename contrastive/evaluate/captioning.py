"""Captions that a model writes of images, and how good they are: BLEU-4, CIDEr-D, and whether they name the class.

And the other way round: which class's prompts the decoder finds likeliest. C classes, T prompts of each.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch

from contrastive.data.loader import eval_loader
from contrastive.data.prompts import default_templates, fill, load_templates
from contrastive.data.record import Source
from contrastive.data.sources import open_source
from contrastive.distributed import collectives
from contrastive.errors import UserError, needs
from contrastive.evaluate.classification import ScoringModel, embed_labelled, names_to_use, told_of
from contrastive.evaluate.compositional import ChoiceImages
from contrastive.evaluate.embedding_writing import has_captions
from contrastive.evaluate.embeddings import answers_of, own_share, usable_captions
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.tasks import TASKS, EvaluationTask, Figure, Outcome, share_interval, zero_shot_outcome
from contrastive.log import bar
from contrastive.models.generate import GenerationConfig, log_likelihood
from contrastive.objectives.captioner import Captioner, captioner_of
from contrastive.patches import Patches
from contrastive.visualize.pictured_model import image_files


class GeneratedCaption(NamedTuple):
    """What a model says of one image."""

    index: int
    """Of the image, in its source."""
    key: str
    text: str
    log_likelihood: float
    """In nats."""


def images_of(places: Sequence[str]) -> list[Source]:
    """Return sources of the images that each place names: an image file, a folder of images, or data as in training.

    Image files that stand side by side are one source. UserError where there is nothing of that name.
    """
    found: list[Source | list[str]] = []
    for place in places:
        path = Path(place).expanduser()
        files = image_files(path)
        if not files:
            found.append(open_source(place))
        elif not path.exists():
            raise UserError(f"no image file {place}")
        elif found and isinstance(found[-1], list):
            found[-1] += map(str, files)
        else:
            found.append([*map(str, files)])
    return [ChoiceImages("images", Path(), tuple(one)) if isinstance(one, list) else one for one in found]


def caption_images(
    captioner: Captioner,
    source: Source,
    how: GenerationConfig,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    device: str | torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
    tell: Callable[[GeneratedCaption], None] | None = None,
) -> tuple[list[GeneratedCaption], Counter[str]]:
    """Write a caption of each image of `source`, or of those at `indices`.

    Returns the captions in the order asked for, and how many images could not be read, by reason. `tell` is called for
    each when it is there.

    With several ranks each captions a share and all get every caption: call it on all of them.
    """
    how.check()
    if how.best_of > 1:
        captioner.bundle.check_text_tower("best_of compares captions with images")
    share = own_share(source, indices)
    preprocess = captioner.bundle.preprocess
    loader = eval_loader(source, preprocess, share, batch_size=batch_size, num_workers=num_workers)
    written, bad = [], []
    with torch.no_grad():
        for batch in bar(loader, "captioning images", shown=progress):
            bad += [reason for reason, _ in batch["bad"]]
            numbers = batch["index"].tolist()
            if not numbers:
                continue
            pixels = preprocess.normalize(batch["image"].to(device, non_blocking=True))
            said = list(map(GeneratedCaption, numbers, batch["key"], *captioner.write(pixels, how, numbers)))
            written += said
            for one in said if tell else ():
                tell(one)
    everyone = collectives.gather_objects((written, bad))
    return [one for of_rank, _ in everyone for one in of_rank], Counter(reason for _, of in everyone for reason in of)


def captioning(
    captioner: Captioner,
    source: Source,
    how: GenerationConfig | None = None,
    *,
    limit: int | None = None,
    **loading,
) -> dict:
    """Score what a model writes of the images of `source`.

    Args:
        how: greedy when None.
        limit, loading: as of `zero_shot`, with the device.

    Returns:
        A dict that JSON can hold: 'bleu4' and 'cider' against all usable captions of each image where the source has
        captions; 'named' in percent where it has class names (see `share_named`), with 'seen_named' and 'heldout_named'
        where it has `heldout_labels`, and of how many images each is: 'num_named' {name: count}; 'num_images',
        'skipped' {reason: count}, 'captions' {key: text}.

    Raises:
        UserError: neither captions nor class names, no readable image, or pycocoevalcap is missing.

    With several ranks, call it on all of them; every rank returns the same.
    """
    captioned = has_captions(source)
    if not captioned and source.class_names is None:
        raise UserError(f"{source.name} has neither captions nor class names to compare what a model says with")
    if captioned:
        answers, skipped = answers_of(source, limit, lambda index: _texts(source, index), "missing_caption")
    else:
        answers, skipped = answers_of(source, limit, source.label, "missing_label")
    written, bad = caption_images(captioner, source, how or GenerationConfig(), indices=list(answers), **loading)
    if not written:
        raise UserError(f"{source.name}: none of its {len(answers)} images can be used")
    texts = [one.text for one in written]
    figures = {}
    if captioned:
        figures |= caption_scores(texts, [answers[one.index] for one in written])
    if source.class_names is not None:
        figures |= _named(texts, [source.label(one.index) for one in written], source)
    said = {one.key: one.text for one in written}
    return figures | {"num_images": len(written), "skipped": dict(skipped + bad), "captions": said}


def _texts(source: Source, index: int) -> list[str]:
    return [text for _, text in usable_captions(source, index)[0]]


def _named(texts: list[str], labels: list[int | None], source: Source) -> dict:
    heldout, figures, counts = source.heldout_labels, {}, {}
    kinds = {"named": lambda label: True}
    if heldout:
        kinds |= {"seen_named": lambda label: label not in heldout, "heldout_named": heldout.__contains__}
    for name, counted in kinds.items():
        some = [pair for pair in zip(texts, labels, strict=True) if pair[1] is not None and counted(pair[1])]
        if some:
            figures[name] = share_named(*zip(*some, strict=True), source.class_names)
            counts[name] = len(some)
    return figures | {"num_named": counts}


def share_named(captions: Sequence[str], labels: Sequence[int], class_names: Sequence[str]) -> float:
    """Return the share of captions that name the class of their image and no other, in percent.

    Of all words that occur in class names, a caption has to have those of its own class, and none else: 'a star that is
    red' names 'red star', and 'a red star and a ring' does not.
    """
    names = [frozenset(words(name)) for name in class_names]
    known = frozenset().union(*names)
    hits = [known.intersection(words(text)) == names[label] for text, label in zip(captions, labels, strict=True)]
    return 100 * sum(hits) / len(hits)


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return 'bleu4' and 'cider' (CIDEr-D), both times 100 as papers print them, by pycocoevalcap's scorers.

    Its tokenizer needs Java, so that texts are split by `words` here: figures of papers, split by the Penn Treebank's
    rules, are close and not the same. CIDEr weighs words by how many images' references have them: it is 0 for a single
    image, and depends on the set.

    Args:
        references: of each caption, one or more.

    Raises:
        UserError: the package is not installed.
    """
    bleu, cider = scorers()
    written = {place: [" ".join(words(text))] for place, text in enumerate(captions)}
    wanted = {place: [" ".join(words(text)) for text in texts] for place, texts in enumerate(references)}
    (*_, bleu4), _ = bleu.compute_score(wanted, written, verbose=0)
    return {"bleu4": 100 * float(bleu4), "cider": 100 * float(cider.compute_score(wanted, written)[0])}


def scorers() -> tuple:
    """Return pycocoevalcap's scorers of BLEU-4 and CIDEr; UserError where the package is not installed."""
    needs("the scoring of captions by BLEU and CIDEr", "pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    return Bleu(4), Cider()


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def zero_shot_by_likelihood(
    captioner: Captioner,
    source: Source,
    *,
    device: str | torch.device,
    templates: Sequence[str] | None = None,
    **loading,
) -> dict:
    """Classify labelled images by which class's prompts the decoder finds likeliest (CapPa, section 4.2).

    A class is as likely as its prompts are in the mean. Arguments, result and errors are those of `zero_shot`.
    """
    names, bundle = names_to_use(source)["class_names"], captioner.bundle
    templates = templates or default_templates(source)
    tokens = captioner.tokenizer([text for name in names for text in fill(templates, name)]).to(device)

    def likelihoods(pixels: torch.Tensor | Patches) -> torch.Tensor:
        patches, own = captioner.patches(pixels), captioner.own_tokens(pixels)
        likely = log_likelihood(captioner.decoder, patches, tokens, own).unflatten(1, (len(names), -1))
        return likely.logsumexp(dim=2) - math.log(likely.shape[2])

    model = ScoringModel(captioner.decoder, len(names), likelihoods)
    scorer = SimpleNamespace(model=model, preprocess=bundle.preprocess)
    images = embed_labelled(scorer, source, len(names), device=device, **loading)
    return told_of(images, images.features, templates)


@TASKS.register("captioning")
@dataclass(frozen=True)
class Captioning(EvaluationTask):
    """What the caption decoder writes of images, against their captions and class names."""

    title = "captions"
    reads_embeddings = False

    data: str
    method: Literal["greedy", "beam", "sample"] = "greedy"
    """How a caption is chosen."""
    best_of: int = 1
    """sample: of so many drawn captions, the one nearest to the image."""

    @property
    def features_title(self) -> str:
        return f"captions, {self.method}" + (f", best of {self.best_of}" if self.best_of > 1 else "")

    def check(self) -> None:
        GenerationConfig(self.method, best_of=self.best_of).check()

    def run(self, subject: EvaluatedModel) -> Outcome:
        captioner = captioner_of(subject.bundle, subject.device)
        how = GenerationConfig(self.method, best_of=self.best_of)
        result = captioning(captioner, subject.source(self.data), how, **subject.reading)
        counts = result.pop("num_named", {})
        figures = {name: Figure(result[name], share_interval(result[name], count)) for name, count in counts.items()}
        figures |= {name: Figure(result[name]) for name in ("bleu4", "cider") if name in result}
        details = {name: value for name, value in result.items() if name not in figures}
        return Outcome(figures, tuple(name for name in ("named", "cider") if name in figures), details)


@TASKS.register("caption_likelihood")
@dataclass(frozen=True)
class CaptionLikelihood(EvaluationTask):
    """Labelled images by the class whose prompts the caption decoder finds likeliest."""

    title, features_title = "zero-shot by caption likelihood", "likelihoods of captions"
    reads_embeddings = False

    data: str
    templates: str | None = None
    """Prompts: a set, or a file; none: those that fit the data."""

    def check(self) -> None:
        if self.templates is not None:
            load_templates(self.templates)

    def run(self, subject: EvaluatedModel) -> Outcome:
        captioner, source = captioner_of(subject.bundle, subject.device), subject.source(self.data)
        templates = None if self.templates is None else load_templates(self.templates)
        result = zero_shot_by_likelihood(captioner, source, templates=templates, **subject.reading)
        return zero_shot_outcome(result, source.heldout_labels)
