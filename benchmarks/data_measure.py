"""What benchmarks/data.py measures, each in a process of its own that is tied to as many cores as it has workers."""

import io
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from data_rivals import IMAGE_SIZE, Load, arrow_rows, batches
from PIL import Image

COMPARED = 64


class Failed(Exception):
    """A measurement that gave no figure; says why."""


def alone(function: Callable, *args: Any, cores: int = 1) -> Any:
    """Return function(*args) from a forked process on `cores` cores with one torch thread. Raises Failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, cores, function, args))
    process.start()
    sender.close()
    try:
        kind, answer = receiver.recv()
    except EOFError:
        kind, answer = "error", "the process was killed"
    except BaseException:
        process.terminate()
        raise
    finally:
        receiver.close()
        process.join()
    if kind == "error":
        raise Failed(answer)
    return answer


def _answer(sender: Any, cores: int, function: Callable, args: tuple) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    try:
        sender.send(("answer", function(*args)))
    except Exception as error:  # one rival's failure is a row, not the end
        sender.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def seconds_per_image(name: str, load: Load, seconds: float) -> float:
    """Return the time of an image over at least `seconds`, after the first batch of each worker."""
    stream = batches(name, load)
    for _ in range(max(1, load.workers)):
        first = next(stream)
    if first.shape != (load.batch, 3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"a batch of shape {tuple(first.shape)}")
    images, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        images += len(next(stream))
    return elapsed / images


def seconds_of_seeks(name: str, load: Load, seeks: int) -> float:
    """Return how long it takes to read `seeks` samples, encoded image and captions, at random indices."""
    if name == "ours":
        from contrastive.data.sources import open_source

        rows = open_source(load.shards)
    else:
        import datasets

        rows = arrow_rows(load).select_columns(["jpg", "txt"]).cast_column("jpg", datasets.Image(decode=False))
    indices = np.random.default_rng(0).integers(0, len(rows), seeks).tolist()
    rows[indices[0]]
    started = time.perf_counter()
    for index in indices:
        rows[index]
    return time.perf_counter() - started


def seconds_to_open(load: Load) -> float:
    """Return how long our source takes to open, once its index is there."""
    from contrastive.data.sources import open_source

    open_source(load.shards)
    started = time.perf_counter()
    open_source(load.shards)
    return time.perf_counter() - started


def pixel_differences(load: Load) -> dict[str, float]:
    """Return mean absolute differences from Pillow, in 1/255, over the first COMPARED images.

    decode: all pixels. resized: decoded and squashed to 224 x 224 for evaluation. trained: as training does
    that, where a JPEG of more than twice the size is reduced while it is decoded.
    """
    from contrastive.data.augment import AugmentConfig
    from contrastive.data.decode import decode
    from contrastive.data.order_choice import order_for
    from contrastive.data.preprocess import Preprocess, PreprocessConfig
    from contrastive.data.samples import PairDataset
    from contrastive.data.sources import open_source
    from contrastive.data.tokenizer import clip_tokenizer

    source = open_source(load.shards)
    preprocess = Preprocess(PreprocessConfig(image_size=IMAGE_SIZE))
    whole = AugmentConfig(crop_scale=(1.0, 1.0))
    dataset = PairDataset(source, order_for(source, 1, 0), clip_tokenizer(), IMAGE_SIZE, whole)
    found = {"decode": [], "resized": [], "trained": []}
    for position in range(min(COMPARED, len(source))):
        trained = dataset[position]
        data = source[trained["index"]].image
        with Image.open(io.BytesIO(data)) as opened:
            reference = opened.convert("RGB")
        small = reference.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        found["decode"].append(_difference(decode(data), reference))
        found["resized"].append(_difference(preprocess.pixels(data), small))
        found["trained"].append(_difference(trained["image"], small))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _difference(pixels: torch.Tensor, reference: Image.Image) -> float:
    expected = torch.from_numpy(np.array(reference)).permute(2, 0, 1)
    return (pixels.float() - expected.float()).abs().mean().item()


def bytes_per_image(load: Load) -> int:
    from contrastive.data.sources import open_source

    source = open_source(load.shards)
    return round(np.mean([len(source[index].image) for index in range(min(COMPARED, len(source)))]))
