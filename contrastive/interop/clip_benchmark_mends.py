"""What LAION's CLIP_benchmark (1.6.2) needs to run with today's libraries, mended in memory after its import.

No file of the package is touched and no figure is computed differently. What stands in the way:

- `cli` imports pycocoevalcap, which only captioning uses.
- `accuracy` calls float() on an array of one element, which NumPy refuses since 2.4 (CLIP_benchmark#147).
- `linear_probe` insists on CUDA, though nothing in it needs it.
- webdataset raises in a loader's worker that has no shard, as with one shard and two workers; and its pipeline holds
  a lambda, so that workers have to be forked, which Python does not do by default since 3.14.
- A dataset that cannot be had ends in a traceback.

It also imports requests without asking for it: our extra `clip-benchmark` does.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from contrastive.errors import UserError


def mended_cli() -> types.ModuleType:
    """Return `clip_benchmark.cli`, mended.

    Raises:
        UserError: clip-benchmark, or something it imports, is not installed.
    """
    try:
        return _import_and_mend()
    except ModuleNotFoundError as error:
        how = "install it with: pip install 'contrastive[clip-benchmark]'"
        if error.name == "clip_benchmark":
            raise UserError(f"clip-benchmark is not installed; {how}") from None
        raise UserError(f"clip-benchmark needs {error.name}, which is not installed; {how}") from None


@functools.cache
def _import_and_mend() -> types.ModuleType:
    importlib.import_module("clip_benchmark")
    _do_without_captioning()
    classification = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
    classification.accuracy = _accuracy
    # Only now, since it takes `accuracy` from there.
    probe = importlib.import_module("clip_benchmark.metrics.linear_probe")
    if not torch.cuda.is_available():
        _probe_on_cpu(probe)
    builder = importlib.import_module("clip_benchmark.datasets.builder")
    builder.build_wds_dataset = _for_any_worker(builder.build_wds_dataset)
    cli = importlib.import_module("clip_benchmark.cli")
    cli.build_dataset = _in_one_line(cli.build_dataset)
    return cli


def _do_without_captioning() -> None:
    name = "clip_benchmark.metrics.captioning"
    try:
        importlib.import_module(name)
    except ImportError as error:
        reason = str(error)

        def evaluate(**_):
            raise UserError(f"--task captioning cannot run: {reason}; pip install pycocoevalcap")

        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].evaluate = evaluate


def _accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Top-k accuracies as shares of 1: output (N, C) scores, target (N,) classes."""
    predicted = output.topk(max(topk), 1, True, True)[1].t()  # (k, N)
    correct = predicted.eq(target.view(1, -1).expand_as(predicted))
    return [correct[:k].sum().item() / len(target) for k in topk]


def _probe_on_cpu(probe: types.ModuleType) -> None:
    """Let the linear probe run without CUDA: no assertion that it is there, and `.cuda()` moves nothing."""
    source = Path(probe.__file__).read_text("utf-8")
    exec(compile(source, probe.__file__, "exec", optimize=1), probe.__dict__)  # as `python -O`: no assertions
    evaluate = probe.evaluate

    def on_cpu(*args, **options):
        with _cuda_moves_nothing():
            return evaluate(*args, **options)

    probe.evaluate = on_cpu


@contextlib.contextmanager
def _cuda_moves_nothing() -> Iterator[None]:
    owners = (torch.Tensor, torch.nn.Module)
    own = [owner.cuda for owner in owners]
    for owner in owners:
        owner.cuda = lambda self, *_, **__: self
    try:
        yield
    finally:
        for owner, method in zip(owners, own, strict=True):
            owner.cuda = method


def _for_any_worker(build: Callable) -> Callable:
    """Drop the stage that takes a worker without a shard for an empty dataset, and the one that cannot be pickled."""
    from webdataset.compat import check_empty

    def build_wds_dataset(*args, **options):
        dataset = build(*args, **options)
        # The lambda is CLIP_benchmark's nodesplitter, which passes all shards on.
        dataset.pipeline = [s for s in dataset.pipeline if s is not check_empty and not _is_lambda(s)]
        return dataset

    return build_wds_dataset


def _is_lambda(stage: object) -> bool:
    return getattr(stage, "__name__", "") == "<lambda>"


def _in_one_line(build: Callable) -> Callable:
    def build_dataset(dataset_name: str, root: str = "root", **options):
        try:
            return build(dataset_name=dataset_name, root=root, **options)
        except (AssertionError, ValueError, RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--dataset {dataset_name} cannot be read from {root}: {reason}") from error

    return build_dataset
