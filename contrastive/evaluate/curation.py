"""Which pairs of a data set to keep, by their embeddings: the best by score, each picture once, none of a test set.

The way of DataComp (arXiv 2304.14108). N images in the order of the data, M texts, E channels. Beside its index a
curation leaves

curation.json      the rules, the model, how many each rule dropped, quantiles of the scores
samples.parquet    index, key, score, dropped (the rule; none: kept), near (the place of what it is near to), cosine
curation.html      the best and the worst pairs, and what was dropped beside what it is near to
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from contrastive.data.record import Source
from contrastive.evaluate.embeddings import EmbeddingSet
from contrastive.evaluate.search import Section, Shot, nearest, picture, said_of, write_gallery
from contrastive.files import write_json, write_whole

ROUNDING = 1e-6  # of cosines in float32: equal images are no less alike than 1
BLOCK = 4096  # rows compared with as many at once

NO_CAPTION, AGAINST, SCORE, DUPLICATE = "no caption", "against", "score", "duplicate"
FIGURES, TABLE, PAGE = "curation.json", "samples.parquet", "curation.html"
SHOWN, PAIRS_SHOWN = 10, 9  # of each kind on the page
UNREADABLE = "unreadable image"
QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Rules:
    """What is dropped, each None or empty where it is not asked for."""

    keep_best: float | None = None
    """Keep this share of the pairs that have a score, the best."""
    min_score: float | None = None
    """Keep pairs whose score is not below."""
    duplicates: float | None = None
    """Drop images that are this near (cosine) to an earlier one that is kept."""
    against_above: float = 0.95
    """Drop images that are this near to one of another set."""


@dataclass(frozen=True)
class Curation:
    """What became of each image."""

    scores: torch.Tensor
    """(N,) float32, the mean cosine of an image with its captions; NaN where it has none."""
    dropped: tuple[str | None, ...]
    """Of each image the rule that dropped it, None for one that is kept: NO_CAPTION, SCORE, DUPLICATE, or AGAINST and
    the name of the other set after a blank."""
    near: torch.Tensor
    """(N,) int64: the row of the image that a DUPLICATE is near to, or the row in the set that it was held AGAINST;
    -1 for others."""
    cosine: torch.Tensor
    """(N,) float32: how near that is; NaN for others."""

    @property
    def kept(self) -> torch.Tensor:
        """(K,) int64, the rows that are kept, rising."""
        return torch.tensor([row for row, rule in enumerate(self.dropped) if rule is None], dtype=torch.int64)

    def rows(self, rule: str) -> list[int]:
        """Return the rows that a rule dropped."""
        return [row for row, own in enumerate(self.dropped) if own == rule]


def curate(
    found: EmbeddingSet, rules: Rules, against: Mapping[str, torch.Tensor], *, device: str | torch.device = "cpu"
) -> Curation:
    """Judge each image of `found`; it is dropped by the first rule that holds, in the order of this list.

    1. It has no caption that can be used, where the set has texts.
    2. It is near to an image of another set.
    3. Its score is below `min_score`, or it is not among the best. The share is one of all pairs that have a score,
       dropped by the other rules or not; of equal scores the earlier one is better.
    4. It is near to an earlier image that no rule dropped, this one included: see `near_earlier`.

    Args:
        against: features (R, E) of other sets by their names.
    """
    features = normalize(found.features, dim=-1)  # where they were stored as float16
    size = len(features)
    dropped: list[str | None] = [None] * size
    near, cosine = torch.full((size,), -1), torch.full((size,), torch.nan)

    def drop(rows: torch.Tensor, rule: str) -> torch.Tensor:
        new = torch.tensor([row for row in rows.tolist() if dropped[row] is None], dtype=torch.int64)
        for row in new.tolist():
            dropped[row] = rule
        return new

    scores = pair_scores(found)
    if found.texts is not None:
        drop(scores.isnan().nonzero()[:, 0], NO_CAPTION)
    for name, others in against.items():
        closest = nearest(features, normalize(others, dim=-1), 1, device=device)
        is_near = closest.scores[:, 0] >= rules.against_above - ROUNDING
        new = drop(is_near.nonzero()[:, 0], f"{AGAINST} {name}")
        near[new], cosine[new] = closest.rows[new, 0], closest.scores[new, 0]
    drop((~among_best(scores, rules.keep_best, rules.min_score)).nonzero()[:, 0], SCORE)
    if rules.duplicates is not None:
        left = torch.tensor([row for row, rule in enumerate(dropped) if rule is None], dtype=torch.int64)
        earlier = near_earlier(features[left], rules.duplicates, device=device)
        twins = (earlier >= 0).nonzero()[:, 0]
        new = drop(left[twins], DUPLICATE)
        near[new] = left[earlier[twins]]
        cosine[new] = (features[new] * features[near[new]]).sum(dim=-1)
    return Curation(scores, tuple(dropped), near, cosine)


def pair_scores(found: EmbeddingSet) -> torch.Tensor:
    """Return the mean cosine of each image with its captions, (N,) float32; NaN for one without, and without texts."""
    size, texts = len(found.features), found.texts
    sums, counts = torch.zeros(size), torch.zeros(size)
    for start in range(0, 0 if texts is None else len(texts.row), BLOCK):  # each with its image's features beside it
        rows, features = (values[start : start + BLOCK] for values in (texts.row, texts.features))
        cosines = (normalize(found.features[rows], dim=-1) * normalize(features, dim=-1)).sum(dim=-1)
        sums.index_add_(0, rows, cosines)
        counts.index_add_(0, rows, torch.ones(len(rows)))
    return sums / counts


def among_best(scores: torch.Tensor, share: float | None, least: float | None) -> torch.Tensor:
    """Return which scores (N,) are not below `least` and among the best `share` of those that are no NaN, bool (N,).

    With neither, all are.
    """
    kept = torch.ones(len(scores), dtype=torch.bool)
    if least is not None:
        kept &= scores >= least
    if share is not None:
        order = scores.nan_to_num(-torch.inf).sort(descending=True, stable=True).indices
        best = order[: round(share * int((~scores.isnan()).sum()))]
        kept &= torch.zeros_like(kept).scatter(0, best, True)
    return kept


def near_earlier(
    features: torch.Tensor, threshold: float, *, device: str | torch.device = "cpu", block: int = BLOCK
) -> torch.Tensor:
    """Return for each row the first kept row before it that is near, -1 for the rows that are kept themselves.

    A row is kept unless its cosine with an earlier kept row is at least `threshold`. So no two kept rows are near, and
    each of the others is near to a kept one; a chain of rows, each near to the next alone, keeps every other one.

    Args:
        features: (N, E) float32, of unit length.

    Returns:
        int64 (N,). Every row is compared with every kept one: N² products in all, 2 * block² numbers held at once.
    """
    first = torch.full((len(features),), -1)
    for start in range(0, len(features), block):
        own = features[start : start + block].to(device)
        for before in range(0, start, block):
            kept = (first[before : before + block] < 0).to(device)
            near = (own @ features[before : before + block].to(device).T >= threshold - ROUNDING) & kept
            place = torch.where(near.any(dim=1), before + near.int().argmax(dim=1), -1).cpu()
            mine = first[start : start + block]
            mine.copy_(torch.where(mine < 0, place, mine))
        near = (own @ own.T >= threshold - ROUNDING).tril(-1).cpu()
        for row in near.any(dim=1).nonzero()[:, 0].tolist():  # in their order: what is dropped drops nothing
            places = (near[row] & (first[start : start + block] < 0)).nonzero()
            if first[start + row] < 0 and len(places):
                first[start + row] = start + int(places[0])
    return first


def figures_of(found: EmbeddingSet, result: Curation, num_samples: int) -> dict:
    """Return the counts and quantiles.

    Returns:
        'samples', 'kept', 'dropped' {rule: count} with the unreadable ones by their reasons, and 'scores'
        {'all', 'kept': {percent: value}}, each empty where there are no scores.
    """
    dropped = {UNREADABLE: num_samples - len(found.index)} | Counter(filter(None, result.dropped))
    kinds = (UNREADABLE, NO_CAPTION, AGAINST, SCORE, DUPLICATE)
    order = (rule for kind in kinds for rule in dropped if rule.startswith(kind))
    return {
        "samples": num_samples,
        "kept": len(result.kept),
        "dropped": {rule: dropped[rule] for rule in order if dropped[rule]},
        "scores": {"all": _quantiles(result.scores), "kept": _quantiles(result.scores[result.kept])},
    }


def _quantiles(scores: torch.Tensor) -> dict[str, float]:
    known = scores[~scores.isnan()].double().numpy()
    if not len(known):
        return {}
    values = np.quantile(known, np.array(QUANTILES) / 100)
    return {f"{percent} %": round(float(value), 4) for percent, value in zip(QUANTILES, values, strict=True)}


def rule_in_words(rule: str, rules: Rules) -> str:
    """Return what a rule drops, with its bound: 'near-duplicate of an earlier image (cosine from 0.95)'."""
    if rule == SCORE:
        bounds = [f"below {rules.min_score:g}"] if rules.min_score is not None else []
        bounds += [f"not among the best {100 * rules.keep_best:g} %"] if rules.keep_best is not None else []
        return f"score {' or '.join(bounds)}"
    if rule == DUPLICATE:
        return f"near-duplicate of an earlier one that is kept (cosine from {rules.duplicates:g})"
    if rule.startswith(AGAINST):
        return f"near to one of {rule.removeprefix(AGAINST).strip()} (cosine from {rules.against_above:g})"
    return {NO_CAPTION: "no caption that can be used", UNREADABLE: "image that cannot be read"}[rule]


def facts_of(figures: Mapping, rules: Rules) -> list[tuple[str, str, str]]:
    """Return the rows of the table: what, how many, percent of all."""
    size = figures["samples"]
    rows = [("samples", size), ("kept", figures["kept"])]
    rows += [(f"dropped: {rule_in_words(rule, rules)}", count) for rule, count in figures["dropped"].items()]
    return [(name, f"{count:,}", f"{100 * count / max(1, size):.1f} %") for name, count in rows]


def score_rows(figures: Mapping) -> list[tuple[str, ...]]:
    """Return the rows of the table of quantiles, its heading first; none without scores."""
    scores = figures["scores"]
    heading = ("score, quantile", *scores["all"])
    rows = [(of, *(f"{value:.3f}" for value in values.values())) for of, values in scores.items() if values]
    return [heading, *rows] if rows else []


def write_report(
    folder: Path,
    source: Source,
    found: EmbeddingSet,
    result: Curation,
    rules: Rules,
    figures: Mapping,
    others: Mapping[str, tuple[Source | None, EmbeddingSet]],
) -> None:
    """Write curation.json, samples.parquet and curation.html.

    Args:
        others: of each set that was held against, by name, its data, where they are at hand, and its embeddings.
    """
    write_json(folder / FIGURES, figures)
    _write_table(folder / TABLE, found, result, others)
    sections = [*_scored(source, found, result), *_pairs(source, found, result, rules, others)]
    remark = f"{figures['kept']:,} of {figures['samples']:,} samples are kept"
    tables = [facts_of(figures, rules), score_rows(figures)]
    write_gallery(folder / PAGE, f"Curated: {source.name}", remark, sections, tables)


def _write_table(path: Path, found: EmbeddingSet, result: Curation, others: Mapping) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = {f"{AGAINST} {name}": other.index for name, (_, other) in others.items()}
    near = [
        None if row < 0 else int(places.get(rule, found.index)[row])
        for row, rule in zip(result.near.tolist(), result.dropped, strict=True)
    ]
    table = {
        "index": pa.array(found.index.numpy()),
        "key": pa.array(found.keys, pa.string()),
        "score": pa.array(result.scores.numpy(), from_pandas=True),
        "dropped": pa.array(result.dropped, pa.string()),
        "near": pa.array(near, pa.int64()),
        "cosine": pa.array(result.cosine.numpy(), from_pandas=True),
    }
    write_whole(path, lambda file: pq.write_table(pa.table(table), file))


def _scored(source: Source, found: EmbeddingSet, result: Curation) -> list[Section]:
    """The pairs of the highest scores and of the lowest."""
    order = result.scores.nan_to_num(-torch.inf).sort(descending=True, stable=True).indices
    order = [row for row in order.tolist() if not result.scores[row].isnan()]
    if not order:
        return []

    def shot(row: int) -> Shot:
        rule = result.dropped[row]
        fate = "kept" if rule is None else f"dropped: {AGAINST if rule.startswith(AGAINST) else rule}"
        images = (picture(source, int(found.index[row])),)
        return _shot(images, f"{result.scores[row]:.3f} · {fate}", source, found, row)

    told = "By the mean cosine of the image with its captions."
    return [
        Section("The best pairs", told, [shot(row) for row in order[:SHOWN]]),
        Section("The worst pairs", told, [shot(row) for row in order[::-1][:SHOWN]]),
    ]


def _pairs(source, found, result: Curation, rules: Rules, others: Mapping) -> list[Section]:
    """What was dropped for what it is near to, the least alike of each rule first: they show where the bound lies."""
    sections = []
    for rule in dict.fromkeys(rule for rule in result.dropped if rule == DUPLICATE or (rule or "").startswith(AGAINST)):
        rows = sorted(result.rows(rule), key=lambda row: (float(result.cosine[row]), row))[:PAIRS_SHOWN]
        other_source, other = others[rule.removeprefix(AGAINST).strip()] if rule != DUPLICATE else (source, found)
        shots = []
        for row in rows:
            near = int(other.index[result.near[row]])
            images = (picture(other_source, near) if other_source else None, picture(source, int(found.index[row])))
            shots.append(_shot(images, f"{result.cosine[row]:.3f}", source, found, row))
        remark = "Right, what was dropped; left, what it is near to. The least alike of them come first."
        sections.append(Section(f"Dropped: {rule_in_words(rule, rules)}", remark, shots))
    return sections


def _shot(images: tuple, title: str, source: Source, found: EmbeddingSet, row: int) -> Shot:
    return Shot(images, title, said_of(source, int(found.index[row])), found.keys[row])
