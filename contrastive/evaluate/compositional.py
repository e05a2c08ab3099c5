"""The right one of captions that share their words or nearly so: does a model read more than a bag of words?

N samples, E embed_dim.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from contrastive.errors import UserError
from contrastive.evaluate.choices import Choice, ImageFiles, read_choices
from contrastive.evaluate.embeddings import check_text_tower, embed_images, embed_texts, pick_indices

PAIR_FIGURES = ("text_score", "image_score", "group_score")
# Of four independent scores: two comparisons right, twice; and both right ones above both wrong ones.
PAIR_CHANCE = (25.0, 25.0, 100 / 6)


def compositional(
    bundle,
    spec_file: str | Path,
    *,
    device: str | torch.device,
    image_root: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    limit: int | None = None,
    progress: bool = False,
) -> dict:
    """Score a model on a file of choices.

    Two layouts (see `read_choices`). One image, its caption and a wrong one or several (SugarCrepe, Hsieh et al.,
    2023): right when the caption is nearer to the image than every wrong one. Two images and two captions
    (Winoground, Thrush et al., 2022): 'text_score' when each image is nearer to its own caption than to the other,
    'image_score' when each caption is nearer to its own image, 'group_score' when both.

    Args:
        bundle: anything with `model`, `preprocess` and `tokenizer`.
        spec_file: .json or .jsonl.
        image_root: the folder that image names start from; that of the file when None.
        limit: score a fixed random subset of that many samples.

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
    files = ImageFiles(str(path), root, _distinct(image for choice in complete for image in choice.images))
    loading = {"device": device, "batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    embedded = embed_images(bundle.model, files, bundle.preprocess, **loading)
    kept = _readable(complete, embedded.bad, skipped)
    if not kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted((+skipped).items()))
        raise UserError(
            f"{path}: none of its {len(choices):,} samples can be used ({why}); images are sought in {root}"
        )
    texts = _distinct(caption for choice in kept for caption in choice.captions)
    text_features = embed_texts(bundle.model, bundle.tokenizer, texts, device=device)
    image_row = {files.files[index]: row for row, index in enumerate(embedded.index.tolist())}
    features = _Features(embedded.features, image_row, text_features, {text: row for row, text in enumerate(texts)})
    figures, chance, hits = _scored(kept, features)
    return {**figures, "chance": chance, "num_samples": len(kept), "skipped": dict(+skipped), "hits": hits}


def _readable(choices: list[Choice], bad: Iterable[tuple[str, str]], skipped: Counter[str]) -> list[Choice]:
    """Those without an image among `bad`, (reason, file); the others are counted in `skipped`."""
    reasons, kept = {key: reason for reason, key in bad}, []
    for choice in choices:
        why = [reasons[image] for image in choice.images if image in reasons]
        skipped.update(why[:1])
        if not why:
            kept.append(choice)
    return kept


class _Features:
    """Unit vectors of image files and of captions, by name."""

    def __init__(self, images: torch.Tensor, image_row: dict[str, int], texts: torch.Tensor, text_row: dict[str, int]):
        self._images, self._image_row, self._texts, self._text_row = images, image_row, texts, text_row

    def similarity(self, pairs: Iterable[tuple[str, str]]) -> torch.Tensor:
        """Return (n,): how near image and caption are to each other."""
        images, texts = zip(*((self._image_row[image], self._text_row[text]) for image, text in pairs), strict=True)
        # Row by row alike, so that equal vectors tie exactly.
        return (self._images[list(images)] * self._texts[list(texts)]).sum(dim=1)


def _scored(choices: list[Choice], features: _Features) -> tuple[dict, dict, torch.Tensor]:
    """Return the figures and their chance levels in percent, and the hits."""
    if len(choices[0].images) == 2:
        hits = _pair_hits(choices, features)
        shares = hits.double().mean(dim=0) * 100
        figures = dict(zip(PAIR_FIGURES, shares.tolist(), strict=True))
        return figures, dict(zip(PAIR_FIGURES, PAIR_CHANCE, strict=True)), hits
    hits = _caption_hits(choices, features)
    chance = sum(100 / len(choice.captions) for choice in choices) / len(choices)
    return {"acc1": 100 * hits.double().mean().item()}, {"acc1": chance}, hits


def _caption_hits(choices: list[Choice], features: _Features) -> torch.Tensor:
    """(N,): the right caption strictly nearer than every wrong one."""
    right = features.similarity((choice.images[0], choice.captions[0]) for choice in choices)
    wrong = features.similarity((choice.images[0], text) for choice in choices for text in choice.captions[1:])
    counts = torch.tensor([len(choice.captions) - 1 for choice in choices])
    above = right.repeat_interleave(counts) > wrong
    ends = counts.cumsum(0)
    wins = torch.cat([torch.zeros(1, dtype=torch.int64), above.cumsum(0)])
    return wins[ends] - wins[ends - counts] == counts


def _pair_hits(choices: list[Choice], features: _Features) -> torch.Tensor:
    """(N, 3): text, image and group score of each."""

    def near(image: int, caption: int) -> torch.Tensor:
        return features.similarity((choice.images[image], choice.captions[caption]) for choice in choices)

    own_0, own_1, cross_01, cross_10 = near(0, 0), near(1, 1), near(0, 1), near(1, 0)
    text = (own_0 > cross_01) & (own_1 > cross_10)
    image = (own_0 > cross_10) & (own_1 > cross_01)
    return torch.stack([text, image, text & image], dim=1)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
