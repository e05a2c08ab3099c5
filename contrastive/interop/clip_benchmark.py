"""contrastive-clip-benchmark: LAION's CLIP_benchmark on the models that `contrastive.load` reads.

    contrastive-clip-benchmark eval --model runs/mine --dataset cifar10 --dataset_root data
    contrastive-clip-benchmark build *.json --output table.csv

Its own flags, datasets, tasks and result files (https://github.com/LAION-AI/CLIP_benchmark). What differs:

- `--model` and `--pretrained_model` take paths of models, or a .txt file of them, one a line. A result names the
  path as "model" and the weights' hash as "pretrained", so that --skip_existing and --feature_root never take the
  figures or features of other weights for these.
- float32 unless --amp is given: the figures are then those of our own evaluators.
- Features of a linear probe are kept only where --feature_root says so.

`--model_type open_clip` gives CLIP_benchmark's own meaning of the model flags back.

What of version 1.6.2 does not run with today's libraries is replaced in memory, name by name; no figure is computed
differently:

- `accuracy` calls float() on an array of one element, which NumPy refuses since 2.4 (CLIP_benchmark#147).
- `linear_probe` insists on CUDA, though nothing in it needs it.
- webdataset raises in a loader's worker that has no shard, as with one shard and two workers; and its pipeline holds
  a lambda, so that workers have to be forked, which Python does not do by default since 3.14.
- `cli` imports pycocoevalcap, which only captioning uses. (And requests, which our extra `clip-benchmark` asks for.)
- A dataset that cannot be had ends in a traceback.
"""

import argparse
import functools
import importlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from contrastive.entry import run_script
from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle, weights_key
from contrastive.interop.loading import load
from contrastive.words import flags_of

PROG = "contrastive-clip-benchmark"
MODEL_TYPE = "contrastive"
_COLLECTION = "the models given to contrastive-clip-benchmark"


class ModelPath(str):
    """A path that stands in a file's name without its slashes: runs/mine as runs_mine."""

    def __format__(self, spec: str) -> str:
        return format("_".join(part for part in Path(self).parts if part.strip("./")), spec)


class _Parser(argparse.ArgumentParser):
    """CLIP_benchmark's flags with our defaults; a mistake is one line."""

    _OURS = {
        "--model": {"default": [], "metavar": "PATH", "help": "Path(s) of models, as contrastive.load takes them"},
        "--pretrained_model": {
            "default": [],
            "metavar": "PATH",
            "help": "The same, or a .txt file of paths, one a line",
        },
        "--pretrained": {"help": "Only with --model_type open_clip"},
        "--model_type": {"default": MODEL_TYPE},
        "--no_amp": {"default": False, "help": "float32: the default here"},
        "--feature_root": {
            "default": None,
            "help": "where to keep the features of linear probes for later runs; give each --dataset_root, --split and "
            "--normalize a folder of its own. By default they are not kept",
        },
        "--skip_load": {"help": "accepted and left aside: features that are there are used anyway"},
    }

    def add_argument(self, *names, **options):
        if names[0] == "--no_amp":
            super().add_argument("--amp", action="store_true", help="bfloat16 or float16, as CLIP_benchmark by default")
        return super().add_argument(*names, **options | self._OURS.get(names[0], {}))

    def error(self, message: str):
        raise UserError(f"{message}. See {self.prog} --help")


def main() -> None:
    """The console script."""
    run_script(PROG, run)


def run(args: list[str]) -> None:
    """Do what the command line `args` says; results are JSON files, named by --output.

    Raises:
        UserError: clip-benchmark is not installed, a wrong flag, a model or dataset that cannot be read, or a model
            without a text tower for a task that needs one.
    """
    cli = mended_cli()
    options = _parsed(cli, args)
    which = getattr(options, "which", None)
    if which == "build":
        cli.main_build(options)
    elif which == "eval":
        if options.model_type == MODEL_TYPE and any(flag.name == "pretrained" for flag in flags_of(args)):
            raise UserError("--pretrained has no effect: --model PATH has its weights; leave it out")
        _evaluate(cli, options)
    else:
        raise UserError("say what to do: eval or build. See --help")


def _parsed(cli: types.ModuleType, args: list[str]) -> argparse.Namespace:
    """CLIP_benchmark's own parser, which reads sys.argv, with our defaults."""
    ours = types.SimpleNamespace(ArgumentParser=_Parser)
    with patch.object(sys, "argv", [PROG, *args]), patch.object(cli, "argparse", ours):
        return cli.get_parser_args()[1]


def _evaluate(cli: types.ModuleType, options: argparse.Namespace) -> None:
    if options.task == "captioning" and options.model_type == MODEL_TYPE:
        raise UserError("--task captioning needs a model that writes text; a dual encoder only compares")
    options.skip_load = False  # of no use, and with it CLIP_benchmark 1.6.2 fails where it writes the result
    if not (options.model or options.pretrained_model):
        raise UserError("give a model: --model PATH")
    _loaded.cache_clear()  # the folder may hold other weights than last time
    if options.model_type == MODEL_TYPE:
        cli.model_collection[_COLLECTION] = [
            (ModelPath(path), f"sha256-{weights_key(_loaded(path).model)[:12]}") for path in _paths(options)
        ]
        options.pretrained_model = [_COLLECTION]
    folder = Path(options.output).parent
    if "{" not in str(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        options.feature_root = options.feature_root or scratch
        for harmless in (r"WebDataset\(shardshuffle", "'pin_memory' argument"):
            warnings.filterwarnings("ignore", message=harmless)
        cli.main_eval(options)


def _paths(options: argparse.Namespace) -> list[str]:
    paths = []
    for given in options.pretrained_model or options.model:
        if given.endswith(".txt") and Path(given).is_file():
            paths += [line.strip() for line in Path(given).read_text().splitlines() if line.strip()]
        else:
            paths.append(given)
    return paths


@functools.lru_cache(maxsize=1)
def _loaded(path: str) -> Bundle:
    """A model on the CPU. It is wanted for its name and again for each dataset: the last one is kept."""
    return load(path)


def _load_for_clip_benchmark(model_name: str, pretrained: str, cache_dir: str | None, device: str):
    """What CLIP_benchmark asks of a model type: (model, transform, tokenizer)."""
    path = str(model_name)
    bundle = _loaded(path)
    tokenizer = bundle.tokenizer
    if tokenizer is None:

        def tokenizer(texts):
            raise UserError(f"{path} has no text tower; of CLIP_benchmark's tasks only linear_probe applies to it")

    return bundle.model.to(device), bundle.preprocess, tokenizer


def mended_cli() -> types.ModuleType:
    """Return `clip_benchmark.cli` with our model type, and with what today's libraries need.

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
    from clip_benchmark import models

    models.TYPE2FUNC[MODEL_TYPE] = _load_for_clip_benchmark
    models.MODEL_TYPES.append(MODEL_TYPE)
    _do_without_captioning()
    from clip_benchmark.metrics import zeroshot_classification

    zeroshot_classification.accuracy = _accuracy
    from clip_benchmark.metrics import linear_probe  # only now: it takes `accuracy` from there

    if not torch.cuda.is_available():
        linear_probe.torch = types.SimpleNamespace(**vars(torch) | {"autocast": _autocast_on_cpu})
        linear_probe.evaluate = _without_cuda(linear_probe.evaluate)
    from clip_benchmark.datasets import builder

    builder.build_wds_dataset = _for_any_worker(builder.build_wds_dataset)
    from clip_benchmark import cli

    cli.build_dataset = _in_one_line(cli.build_dataset)
    return cli


def _do_without_captioning() -> None:
    name = "clip_benchmark.metrics.captioning"
    try:
        importlib.import_module(name)
    except ImportError as error:
        reason = str(error)

        def evaluate(**_):
            raise UserError(f"--task captioning cannot run: {reason}; pip install 'contrastive[captions]'")

        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].evaluate = evaluate


def _accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Top-k accuracies as shares of 1: output (N, C) scores, target (N,) classes."""
    predicted = output.topk(max(topk), 1, True, True)[1].t()  # (k, N)
    correct = predicted.eq(target.view(1, -1).expand_as(predicted))
    return [correct[:k].sum().item() / len(target) for k in topk]


class _Cpu(str):
    """'cpu', which also passes where 'cuda' is insisted on."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other in ("cpu", "cuda")


def _autocast_on_cpu(device: str, enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", enabled=enabled)  # a plain 'cpu': torch asks for the kind of device, too


def _without_cuda(evaluate: Callable) -> Callable:
    """Let the linear probe run on the CPU: `.cuda()` moves nothing while it does."""

    def on_cpu(*args, device: str, **options):
        with (
            patch.object(torch.Tensor, "cuda", lambda self: self),
            patch.object(torch.nn.Module, "cuda", lambda self: self),
        ):
            return evaluate(*args, device=_Cpu("cpu"), **options)

    return on_cpu


def _for_any_worker(build: Callable) -> Callable:
    """Drop the stage that takes a worker without a shard for an empty dataset, and the one that cannot be pickled."""
    from webdataset.compat import check_empty

    def build_wds_dataset(*args, **options):
        dataset = build(*args, **options)
        # The lambda is CLIP_benchmark's nodesplitter, which passes all shards on.
        dropped = (check_empty.__name__, "<lambda>")
        dataset.pipeline = [stage for stage in dataset.pipeline if getattr(stage, "__name__", "") not in dropped]
        return dataset

    return build_wds_dataset


def _in_one_line(build: Callable) -> Callable:
    def build_dataset(dataset_name: str, root: str = "root", **options):
        try:
            return build(dataset_name=dataset_name, root=root, **options)
        except (AssertionError, ValueError, RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--dataset {dataset_name} cannot be read from {root}: {reason}") from error

    return build_dataset
