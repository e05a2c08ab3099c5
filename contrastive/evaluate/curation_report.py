"""What a curation leaves beside its index: the figures, a table of all samples, a page; and what it prints.

curation.json      the rules, the model, how many each rule dropped, quantiles of the scores
samples.parquet    index, key, score, dropped (the rule; none: kept), near (the place of what it is near to), cosine
curation.html      the best and the worst pairs, and what was dropped beside what it is near to
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from contrastive.data.record import Source
from contrastive.evaluate.curation import AGAINST, DUPLICATE, NO_CAPTION, SCORE, Curation, Rules
from contrastive.evaluate.embeddings import EmbeddingSet
from contrastive.evaluate.gallery import Section, Shot, picture, said_of, write_gallery
from contrastive.files import write_json, write_whole

FIGURES, TABLE, PAGE = "curation.json", "samples.parquet", "curation.html"
SHOWN, PAIRS_SHOWN = 10, 9  # of each kind on the page
UNREADABLE = "unreadable image"
QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def figures_of(found: EmbeddingSet, result: Curation, num_samples: int) -> dict:
    """Return the counts and quantiles.

    Returns:
        'samples', 'kept', 'dropped' {rule: count} with the unreadable ones by their reasons, and 'scores'
        {'all', 'kept': {percent: value}}, each empty where there are no scores.
    """
    dropped = {UNREADABLE: num_samples - len(found.index)} | Counter(filter(None, result.dropped))
    order = (
        rule
        for kind in (UNREADABLE, NO_CAPTION, AGAINST, SCORE, DUPLICATE)
        for rule in dropped
        if rule.startswith(kind)
    )
    kept = result.kept
    quantiles = {"all": _quantiles(result.scores), "kept": _quantiles(result.scores[kept])}
    return {
        "samples": num_samples,
        "kept": len(kept),
        "dropped": {rule: dropped[rule] for rule in order if dropped[rule]},
        "scores": quantiles,
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

    def shots(rows: Sequence[int]) -> list[Shot]:
        return [
            _shot((picture(source, int(found.index[row])),), result.scores[row], _fate(result, row), source, found, row)
            for row in rows
        ]

    told = "By the mean cosine of the image with its captions."
    return [
        Section("The best pairs", told, shots(order[:SHOWN])),
        Section("The worst pairs", told, shots(order[::-1][:SHOWN])),
    ]


def _fate(result: Curation, row: int) -> str:
    rule = result.dropped[row]
    return "kept" if rule is None else f"dropped: {AGAINST if rule.startswith(AGAINST) else rule}"


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
            shots.append(_shot(images, result.cosine[row], "", source, found, row))
        title = rule_in_words(rule, rules)
        remark = "Right, what was dropped; left, what it is near to. The least alike of them come first."
        sections.append(Section(f"Dropped: {title}", remark, shots))
    return sections


def _shot(images, figure, after: str, source: Source, found: EmbeddingSet, row: int) -> Shot:
    title = f"{figure:.3f}{' · ' if after else ''}{after}"
    return Shot(images, title, said_of(source, int(found.index[row])), found.keys[row] if found.keys else "")
