"""report.html of a training run: one page, nothing fetched, that shows what the run did."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contrastive.config import flatten
from contrastive.data.loader import eval_loader
from contrastive.data.record import BadSample
from contrastive.evaluate.embeddings import embed_texts, evaluating, pick_indices
from contrastive.evaluate.report_charts import headlines, rows_of, score_charts, scores_of, training_charts
from contrastive.files import write_whole
from contrastive.page import PARTS, data_uri, filled, html_page, thumbnail
from contrastive.patches import one_by_one

MAX_WRITTEN_PAIRS = 20
NUM_SHOWN = 5


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
        retrievals: {'caption', 'images' uint8 (H, W, 3), 'scores', 'correct' place of the right image among them,
            'rank' of the right one in the gallery, from 1, and 'gallery', the number of images to choose from}.
        examples_from: the data that pairs and retrievals are of.
        bad_samples: how many samples were skipped, by reason. bad_keys: the first keys of each reason.

    `collect_examples` makes similarity, pairs, retrievals and examples_from.
    """
    train, evaluations = rows_of(metrics, "train"), rows_of(metrics, "eval")
    bad = sorted((bad_samples or {}).items(), key=lambda item: -item[1])
    body = filled(
        PARTS / "report.html.jinja",
        headlines=headlines(train, evaluations),
        train=train,
        training_charts=training_charts(train),
        evaluations=evaluations,
        scores=scores_of(evaluations),
        score_charts=score_charts(evaluations),
        similarity=None if similarity is None or len(similarity) == 0 else _similarity(similarity, len(pairs)),
        pairs=pairs,
        retrievals=retrievals,
        examples_from=examples_from,
        bad_samples=[(reason, count, (bad_keys or {}).get(reason, ())) for reason, count in bad if bad[0][1]],
        options=[(name, str(value)) for name, value in flatten(config).items()],
        thumbnail=thumbnail,
    )
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    steps = f"{train[-1]['step']:,} steps" if train else "no step logged"
    page = html_page(title, f"{steps} · {date}", body, "charts.css", "report.css", "charts.js")
    write_whole(Path(path), page)


def _similarity(similarity: np.ndarray, num_pairs: int) -> dict:
    """What the page says of the cosines (n, n), with a picture of them where their pairs do not stand beside them."""
    scores = np.asarray(similarity, dtype=np.float64)
    count, own, low, high = len(scores), scores.diagonal(), np.nanmin(scores), np.nanmax(scores)
    shade = np.nan_to_num((scores - low) / max(high - low, 1e-9))
    return {
        "count": count,
        # Ties and NaNs count as wrong.
        "right": int(((scores < own[:, None]).sum(axis=1) == count - 1).sum()),
        "own": own.mean(),
        "others": (scores.sum() - own.sum()) / max(1, count * (count - 1)),
        "scores": scores.tolist(),
        "shade": shade.tolist(),
        "low": low,
        "high": high,
        "picture": _heatmap(shade) if count > MAX_WRITTEN_PAIRS or num_pairs != count else None,
    }


def _heatmap(shade: np.ndarray) -> str:
    from matplotlib import colormaps

    return data_uri(Image.fromarray((255 * colormaps["viridis"](shade)[..., :3]).astype(np.uint8)))


def collect_examples(
    model, source, preprocess, tokenizer, device: str | torch.device, num: int = 16, gallery: int = 256
) -> dict:
    """Return what `write_report` shows of a source: a similarity matrix and sample retrievals.

    Args:
        num: pairs in the matrix, with different captions where there are enough.
        gallery: images that the sample retrievals choose from, a fixed random subset.

    Returns:
        'similarity', 'pairs', 'retrievals' and 'examples_from', as `write_report` takes them. Of a retrieval the
        nearest images come first, and the right one after them when it is not among them. The first three are empty or
        None when fewer than two images have a caption.

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
                pixels.extend(one.permute(1, 2, 0).numpy() for one in one_by_one(batch["image"]))
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
