"""Captions that a model writes of images, and how good they are: BLEU-4, CIDEr-D, and whether they name the class."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from contrastive.data.loader import eval_loader
from contrastive.data.record import Source
from contrastive.distributed import collectives
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import answers_of, evaluating, usable_captions
from contrastive.evaluate.evaluated_model import has_captions
from contrastive.log import bar
from contrastive.models.caption_decoder import CaptionDecoder
from contrastive.models.generate import GenerationConfig, generate


class GeneratedCaption(NamedTuple):
    """What a model says of one image."""

    index: int
    """Of the image, in its source."""
    key: str
    text: str
    log_likelihood: float
    """In nats."""


def caption_images(
    model,
    decoder: CaptionDecoder,
    preprocess,
    tokenizer,
    source: Source,
    how: GenerationConfig,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    device,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[list[GeneratedCaption], Counter[str]]:
    """Write a caption of each image of `source`, or of those at `indices`.

    Returns the captions in the order asked for, and how many images could not be read, by reason.

    With several ranks each captions a share and all get every caption: call it on all of them.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    world, rank = collectives.world_size(), collectives.rank()
    share = indices[rank * len(indices) // world : (rank + 1) * len(indices) // world]
    loader = eval_loader(source, preprocess, share, batch_size=batch_size, num_workers=num_workers)
    written, bad = [], []
    with evaluating(model), evaluating(decoder):
        for batch in bar(loader, "captioning images", -(-len(share) // batch_size), shown=progress):
            bad += [reason for reason, _ in batch["bad"]]
            numbers = batch["index"].tolist()
            if not numbers:
                continue
            pixels = preprocess.normalize(batch["image"].to(device, non_blocking=True))
            ids, score = generate(decoder, model.image_tower.forward_features(pixels), how, numbers)
            texts = map(tokenizer.decode, ids.cpu())
            written += map(GeneratedCaption, numbers, batch["key"], texts, score.tolist())
    everyone = collectives.gather_objects((written, bad))
    return [one for of_rank, _ in everyone for one in of_rank], Counter(reason for _, of in everyone for reason in of)


def captioning(
    model,
    decoder: CaptionDecoder,
    preprocess,
    tokenizer,
    source: Source,
    how: GenerationConfig | None = None,
    *,
    limit: int | None = None,
    **loading,
) -> dict:
    """Score what a model writes of the images of `source`.

    Args:
        how: greedy when None.
        limit: caption a fixed random subset of that many images.
        loading: device, batch_size, num_workers, progress, as `caption_images` takes them.

    Returns:
        A dict that JSON can hold: 'bleu4' and 'cider' against all usable captions of each image where the source has
        captions; 'named' in percent where it has class names (see `share_named`), with 'seen_named' and 'heldout_named'
        where it has `heldout_labels`; 'num_images', 'skipped' {reason: count}, 'captions' {key: text}.

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
    written, bad = caption_images(
        model, decoder, preprocess, tokenizer, source, how or GenerationConfig(), indices=list(answers), **loading
    )
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


def _named(texts: list[str], labels: list[int | None], source: Source) -> dict[str, float]:
    heldout, figures = source.heldout_labels, {}
    kinds = {"named": lambda label: True}
    if heldout:
        kinds |= {"seen_named": lambda label: label not in heldout, "heldout_named": heldout.__contains__}
    for name, counts in kinds.items():
        some = [(text, label) for text, label in zip(texts, labels, strict=True) if label is not None and counts(label)]
        if some:
            figures[name] = share_named(*zip(*some, strict=True), source.class_names)
    return figures


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
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UserError("BLEU and CIDEr need pycocoevalcap; pip install pycocoevalcap") from None
    written = {place: [" ".join(words(text))] for place, text in enumerate(captions)}
    wanted = {place: [" ".join(words(text)) for text in texts] for place, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, written, verbose=0)
    cider, _ = Cider().compute_score(wanted, written)
    return {"bleu4": 100 * float(bleu[3]), "cider": 100 * float(cider)}


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())
