"""report.html of a training run: one page, nothing fetched, that shows what the run did."""

import base64
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np

from contrastive.evaluate.report_figures import (
    best,
    column,
    headlines,
    rows_of,
    score_charts,
    scores_of,
    training_charts,
)
from contrastive.evaluate.report_style import CSS, SCRIPT

MAX_WRITTEN_PAIRS = 20
THUMBNAIL = 128
SMALL = 64


def write_report(
    path: Path | str,
    *,
    title: str,
    config: Mapping,
    metrics: list[dict],
    similarity: np.ndarray | None = None,
    pairs: Sequence[tuple[np.ndarray, str]] = (),
    retrievals: Sequence[Mapping] = (),
    examples_from: str = "held-out data",
    bad_samples: Mapping[str, int] | None = None,
    bad_keys: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the report to `path`, whole or not at all.

    Args:
        config: the run's options, nested.
        metrics: rows of metrics.jsonl: {'kind': 'train' or 'eval', 'step': int, name: number}. 'data_wait' is
            a share (0 to 1), scores are percent.
        similarity: (n, n) cosines of held-out pairs, row the image, column the caption.
        pairs: the n pairs, (uint8 (H, W, 3), caption).
        retrievals: {'caption', 'images' uint8 (H, W, 3), 'scores', 'correct' place of the right image or
            None}, and if known 'rank' of the right one and 'gallery', the number of images to choose from.
        examples_from: the data that pairs and retrievals are of.
        bad_samples: how many samples were skipped, by reason. bad_keys: the first keys of each reason.

    `collect_examples` makes similarity, pairs, retrievals and examples_from.
    """
    train, evaluations = rows_of(metrics, "train"), rows_of(metrics, "eval")
    sections = [
        _headlines(train, evaluations),
        _section("Training", "", _charts(training_charts(train)), train),
        _evaluations(evaluations),
        _similarity(similarity, pairs, examples_from),
        _retrievals(retrievals, examples_from),
        _bad_samples(bad_samples or {}, bad_keys or {}, train),
        _config(config),
    ]
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    steps = f"{train[-1]['step']:,} steps" if train else "no step logged"
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{steps} · {date}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _section(title: str, remark: str, body: str, content=True) -> str:
    if not content:
        return ""
    text = f"<p>{remark}</p>" if remark else ""
    return f"<section><h2>{title}</h2>{text}{body}</section>"


def _headlines(train: list[dict], evaluations: list[dict]) -> str:
    tiles = [
        f'<div class="card tile"><b>{escape(figure)}</b>{escape(name)}<span>{escape(remark)}</span></div>'
        for name, figure, remark in headlines(train, evaluations)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _evaluations(rows: list[dict]) -> str:
    lines = []
    for score in scores_of(rows):
        values = column(rows, score.key)
        last = score.written(values[np.isfinite(values)][-1])
        top, step = best(rows, score)
        lines.append(
            f"<tr><td>{escape(score.kind)}</td><td>{escape(score.source)}</td><td>{escape(score.name)}</td>"
            f'<td class="n">{last}</td><td class="n">{score.written(top)}</td><td class="n">{step:,}</td></tr>'
        )
    head = (
        '<tr><th>evaluation</th><th>data</th><th>score</th><th class="n">last</th><th class="n">best</th>'
        '<th class="n">best at step</th></tr>'
    )
    table = f'<div class="card scroll"><table class="list">{head}{"".join(lines)}</table></div>'
    return _section("Evaluation", "", _charts(score_charts(rows)) + table, lines)


def _charts(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _similarity(similarity: np.ndarray | None, pairs: Sequence[tuple[np.ndarray, str]], examples_from: str) -> str:
    if similarity is None or len(similarity) == 0:
        return ""
    scores = np.asarray(similarity, dtype=np.float64)
    count = len(scores)
    own = scores.diagonal()
    # Ties and NaNs count as wrong.
    right = int(((scores < own[:, None]).sum(axis=1) == count - 1).sum())
    others = (scores.sum() - own.sum()) / max(1, count * (count - 1))
    remark = (
        f"Cosine of each image (row) with each caption (column) of {count} pairs of {escape(examples_from)}. "
        f"An image's own caption is the nearest for {right} of {count}. Mean on the diagonal "
        f"{own.mean():.2f}, elsewhere {others:.2f}."
    )
    if count > MAX_WRITTEN_PAIRS or len(pairs) != count:
        return _section("Similarity of pairs", remark, _heatmap(scores))
    captions = "".join(f"<li>{escape(caption)}</li>" for _, caption in pairs)
    matrix = f'<div class="scroll">{_matrix(scores, pairs)}</div>'
    body = f'<div class="card matrix">{matrix}<ol>{captions}</ol></div>'
    return _section("Similarity of pairs", remark, body)


def _matrix(scores: np.ndarray, pairs: Sequence[tuple[np.ndarray, str]]) -> str:
    low, high = np.nanmin(scores), np.nanmax(scores)
    shade = np.nan_to_num(100 * (scores - low) / max(high - low, 1e-9))
    names = "".join(f'<th title="{escape(caption)}">{i}</th>' for i, (_, caption) in enumerate(pairs, start=1))
    lines = [f"<tr><th></th>{names}</tr>"]
    for row, (image, caption) in enumerate(pairs):
        cells = [f'<td class="head">{_thumbnail(image, caption)}</td>']
        for column_, score in enumerate(scores[row]):
            classes = "strong " if shade[row, column_] > 55 else ""
            classes += ("top " if shade[row, column_] > 75 else "") + ("own" if row == column_ else "")
            written = f"{score:.2f}".replace("0.", ".")
            cells.append(
                f'<td class="{classes.strip()}" style="--v:{shade[row, column_]:.0f}" '
                f'title="image {row + 1}, caption {column_ + 1}: {score:.3f}">{written}</td>'
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _heatmap(scores: np.ndarray) -> str:
    from matplotlib import colormaps

    low, high = np.nanmin(scores), np.nanmax(scores)
    shade = np.nan_to_num((scores - low) / max(high - low, 1e-9))
    pixels = (255 * colormaps["viridis"](shade)[..., :3]).astype(np.uint8)
    picture = f'<img class="small heatmap" src="{_data_uri(pixels, "PNG")}" alt="similarity matrix">'
    return f'<div class="card map">{picture}<p>{low:.2f} (dark) to {high:.2f} (bright)</p></div>'


def _retrievals(retrievals: Sequence[Mapping], examples_from: str) -> str:
    rows = []
    for found in retrievals:
        shots = []
        for place, (image, score) in enumerate(zip(found["images"], found["scores"], strict=True)):
            own = place == found["correct"]
            rank = found.get("rank")
            if own and rank is not None and rank > place + 1:
                shots.append('<div class="gap">…</div>')
            mark = "✓ " if own else ""
            alt = "the right image" if own else f"image {place + 1}"
            shots.append(f'<figure class="{"own" if own else ""}">{_thumbnail(image, alt)}{mark}{score:.3f}</figure>')
        rank = found.get("rank")
        gallery = f" of {found['gallery']:,}" if found.get("gallery") else ""
        place = f"<small>right image at rank {rank:,}{gallery}</small>" if rank is not None else ""
        rows.append(
            f'<div class="row"><div class="caption">{escape(found["caption"])}{place}</div>'
            f'<div class="shots">{"".join(shots)}</div></div>'
        )
    remark = (
        f"The images of {escape(examples_from)} nearest to a caption, nearest first, with their cosine. "
        "The right one is marked."
    )
    return _section("Sample retrievals", remark, f'<div class="card">{"".join(rows)}</div>', rows)


def _bad_samples(counts: Mapping[str, int], keys: Mapping[str, Sequence[str]], train: list[dict]) -> str:
    if not any(counts.values()):
        return _section("Skipped samples", "Every sample could be used.", "", train)
    lines = "".join(
        f'<tr><td>{escape(str(reason).replace("_", " "))}</td><td class="n">{count:,}</td>'
        f"<td>{escape(', '.join(keys.get(reason, ())))}</td></tr>"
        for reason, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    remark = "Replaced by other samples, so that batches stay full."
    head = '<tr><th>reason</th><th class="n">samples</th><th>the first of them</th></tr>'
    return _section("Skipped samples", remark, f'<div class="card"><table class="list">{head}{lines}</table></div>')


def _config(config: Mapping) -> str:
    options = list(_flattened(config))
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(value)}</code></td></tr>" for name, value in options
    )
    body = (
        f'<details class="card"><summary>{len(options)} options</summary><table class="list">{lines}</table></details>'
    )
    return _section("Configuration", "", body, options)


def _flattened(value, name: str = ""):
    """(dotted name, value) of every option: the names of the command line's flags."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


def _thumbnail(image: np.ndarray, alt: str) -> str:
    # Small pictures keep their pixels when the page enlarges them.
    if max(image.shape[:2]) <= SMALL:
        return f'<img class="small" src="{_data_uri(image, "PNG")}" alt="{escape(alt)}">'
    return f'<img src="{_data_uri(image, "JPEG")}" alt="{escape(alt)}">'


def _data_uri(image: np.ndarray, kind: Literal["PNG", "JPEG"]) -> str:
    """(H, W, 3) uint8 as a data: URI; a JPEG has 128 pixels a side at most."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    data = io.BytesIO()
    if kind == "JPEG":
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(data, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
