"""A few held-out pairs seen through the model, for the report."""

import numpy as np
import torch

from contrastive.data.loader import eval_loader
from contrastive.data.record import BadSample
from contrastive.evaluate.embeddings import embed_texts, evaluating, pick_indices

NUM_SHOWN = 5


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
