"""report.html of a training run: one page, nothing fetched, that shows what the run did."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contrastive.data.loader import eval_loader
from contrastive.data.record import BadSample
from contrastive.evaluate.embeddings import embed_texts, evaluating, pick_indices
from contrastive.evaluate.report_charts import (
    headlines,
    rows_of,
    score_charts,
    scores_of,
    training_charts,
)
from contrastive.files import write_whole
from contrastive.page import data_uri, html_page, html_table

MAX_WRITTEN_PAIRS = 20
THUMBNAIL = 128
NUM_SHOWN = 5
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
        retrievals: {'caption', 'images' uint8 (H, W, 3), 'scores', 'correct' place of the right image, 'rank' of
            the right one in the gallery, and 'gallery', the number of images to choose from}.
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
    body = "\n".join(section for section in sections if section)
    page = html_page(title, f"{steps} · {date}", body, "charts.css", "report.css", "charts.js")
    write_whole(Path(path), page)


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
        last = int(np.flatnonzero(np.isfinite(score.values))[-1])
        told = (score.task, score.source, score.title, score.written(last), score.written(score.best))
        lines.append([*map(escape, told), f"{rows[score.best]['step']:,}"])
    head = ("evaluation", "data", "score", "last", "best", "best at step")
    table = f'<div class="card scroll">{html_table(head, lines, numbers=(3, 4, 5))}</div>'
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
    picture = f'<img class="small heatmap" src="{data_uri(Image.fromarray(pixels))}" alt="similarity matrix">'
    return f'<div class="card map">{picture}<p>{low:.2f} (dark) to {high:.2f} (bright)</p></div>'


def _retrievals(retrievals: Sequence[Mapping], examples_from: str) -> str:
    remark = (
        f"The images of {escape(examples_from)} nearest to a caption, nearest first, with their cosine. "
        "The right one is marked."
    )
    rows = "".join(_retrieval_row(**found) for found in retrievals)
    return _section("Sample retrievals", remark, f'<div class="card">{rows}</div>', rows)


def _retrieval_row(
    caption: str, images: Sequence[np.ndarray], scores: Sequence[float], correct: int, rank: int, gallery: int
) -> str:
    shots = []
    for place, (image, score) in enumerate(zip(images, scores, strict=True)):
        if place == correct:
            gap = '<div class="gap">…</div>' if rank > place + 1 else ""
            shots.append(f'{gap}<figure class="own">{_thumbnail(image, "the right image")}✓ {score:.3f}</figure>')
        else:
            shots.append(f'<figure class="">{_thumbnail(image, f"image {place + 1}")}{score:.3f}</figure>')
    told = f"{escape(caption)}<small>right image at rank {rank:,} of {gallery:,}</small>"
    return f'<div class="row"><div class="caption">{told}</div><div class="shots">{"".join(shots)}</div></div>'


def _bad_samples(counts: Mapping[str, int], keys: Mapping[str, Sequence[str]], train: list[dict]) -> str:
    if not any(counts.values()):
        return _section("Skipped samples", "Every sample could be used.", "", train)
    rows = [
        (escape(str(reason).replace("_", " ")), f"{count:,}", escape(", ".join(keys.get(reason, ()))))
        for reason, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    table = html_table(("reason", "samples", "the first of them"), rows, numbers=(1,))
    remark = "Replaced by other samples, so that batches stay full."
    return _section("Skipped samples", remark, f'<div class="card">{table}</div>')


def _config(config: Mapping) -> str:
    options = [(f"<code>{escape(name)}</code>", f"<code>{escape(value)}</code>") for name, value in _flattened(config)]
    table = html_table((), options)
    body = f'<details class="card"><summary>{len(options)} options</summary>{table}</details>'
    return _section("Configuration", "", body, options)


def _flattened(value, name: str = ""):
    """(dotted name, value) of every option: the names of the command line's flags."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


def _thumbnail(image: np.ndarray, alt: str) -> str:
    """An <img> of (H, W, 3) uint8, at most 128 pixels a side."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) <= SMALL:  # keeps its pixels when the page enlarges it
        return f'<img class="small" src="{data_uri(picture)}" alt="{escape(alt)}">'
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return f'<img src="{data_uri(picture, "JPEG")}" alt="{escape(alt)}">'


def collect_examples(
    model, source, preprocess, tokenizer, device: str | torch.device, num: int = 16, gallery: int = 256
) -> dict:
    """Return what `write_report` shows of a source: a similarity matrix and sample retrievals.

    Args:
        num: pairs in the matrix, with different captions where there are enough.
        gallery: images that the sample retrievals choose from, a fixed random subset.

    Returns:
        'similarity' (num, num) float32 cosines, row the image, column the caption; 'pairs' [(uint8 (H, W, 3),
        caption)]; 'retrievals' [{'caption', 'images', 'scores', 'correct', 'rank', 'gallery'}]: the nearest
        images first, and the right one after them when it is not among them; `correct` is its place in the
        list, `rank` its place in the gallery, from 1; 'examples_from', the source's name. The first three
        are empty or None when fewer than two images have a caption.

    Runs on the calling rank alone: no collectives, so the main process may call it by itself.
    """
    pixels, features, indices = _embedded(model, source, preprocess, device, max(gallery, num))
    captions = [_first_caption(source, index) for index in indices]
    rows = [row for row, caption in enumerate(captions) if caption is not None]
    first_with = {captions[row]: row for row in reversed(rows)}
    chosen = sorted(first_with.values())[:num]
    if len(chosen) < 2:
        return {"similarity": None, "pairs": [], "retrievals": [], "examples_from": source.name}
    text_features = embed_texts(model, tokenizer, [captions[row] for row in chosen], device=device)
    scores = (text_features @ features.T).numpy()
    shown = range(0, len(chosen), max(1, len(chosen) // 8))
    return {
        "similarity": scores[:, chosen].T,
        "pairs": [(pixels[row], captions[row]) for row in chosen],
        "retrievals": [_retrieval(captions[chosen[i]], chosen[i], scores[i], pixels) for i in shown],
        "examples_from": source.name,
    }


def _first_caption(source, index: int) -> str | None:
    try:
        return next((text for text in source.captions(index) if text.strip()), None)
    except BadSample:
        return None


def _embedded(model, source, preprocess, device, num: int) -> tuple[list[np.ndarray], torch.Tensor, list[int]]:
    """Pictures as uint8 (H, W, 3), features (n, E) and source indices of `num` readable images at most."""
    pixels, features, indices = [], [torch.empty(0, model.config.embed_dim)], []
    picked = pick_indices(len(source), num)
    with evaluating(model):
        for batch in eval_loader(source, preprocess, picked, batch_size=64, num_workers=0):
            if len(batch["index"]):
                pixels.extend(batch["image"].permute(0, 2, 3, 1).cpu().numpy())
                normalised = preprocess.normalize(batch["image"].to(device))
                features.append(model.encode_image(normalised).float().cpu())
                indices.extend(batch["index"].tolist())
    return pixels, torch.cat(features), indices


def _retrieval(caption: str, own: int, scores: np.ndarray, pixels: list[np.ndarray]) -> dict:
    order = np.argsort(-scores, kind="stable")
    # Ties count against the model, as in the figures.
    rank = int((~(scores < scores[own])).sum())
    nearest = [int(row) for row in order if row != own][: NUM_SHOWN - (rank <= NUM_SHOWN)]
    place = min(rank, NUM_SHOWN + 1) - 1
    shown = nearest[:place] + [own] + nearest[place:]
    return {
        "caption": caption,
        "images": [pixels[row] for row in shown],
        "scores": [float(scores[row]) for row in shown],
        "correct": place,
        "rank": rank,
        "gallery": len(pixels),
    }
