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
"""

import argparse
import functools
import sys
import tempfile
import types
import warnings
from pathlib import Path

from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle, weights_key
from contrastive.interop.clip_benchmark_mends import mended_cli
from contrastive.interop.loading import load
from contrastive.log import run_script

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
        _evaluate(cli, options)
    else:
        raise UserError("say what to do: eval or build. See --help")


def _parsed(cli: types.ModuleType, args: list[str]) -> argparse.Namespace:
    """CLIP_benchmark's own parser, which reads sys.argv, with our defaults."""
    from clip_benchmark import models

    models.TYPE2FUNC[MODEL_TYPE] = _load_for_clip_benchmark
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    argv, own = sys.argv, cli.argparse
    sys.argv, cli.argparse = [PROG, *args], types.SimpleNamespace(ArgumentParser=_Parser)
    try:
        return cli.get_parser_args()[1]
    finally:
        sys.argv, cli.argparse = argv, own


def _evaluate(cli: types.ModuleType, options: argparse.Namespace) -> None:
    if options.task == "captioning" and options.model_type == MODEL_TYPE:
        raise UserError("--task captioning needs a model that writes text; a dual encoder only compares")
    options.skip_load = False  # of no use, and with it CLIP_benchmark 1.6.2 fails where it writes the result
    if not (options.model or options.pretrained_model):
        raise UserError("give a model: --model PATH")
    _loaded.cache_clear()  # the folder may hold other weights than last time
    if options.model_type == MODEL_TYPE:
        cli.model_collection[_COLLECTION] = [(ModelPath(path), _weights_of(path)) for path in _paths(options)]
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


def _weights_of(path: str) -> str:
    return f"sha256-{weights_key(_loaded(path).model)[:12]}"


def _load_for_clip_benchmark(model_name: str, pretrained: str, cache_dir: str | None, device: str):
    """What CLIP_benchmark asks of a model type: (model, transform, tokenizer)."""
    path = str(model_name)
    bundle = _loaded(path)
    tokenizer = bundle.tokenizer
    if tokenizer is None:

        def tokenizer(texts):
            raise UserError(f"{path} has no text tower; of CLIP_benchmark's tasks only linear_probe applies to it")

    return bundle.model.to(device), bundle.preprocess, tokenizer
