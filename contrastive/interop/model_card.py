"""README.md of an exported model: what it is, where it comes from, what it scores, how its library loads it.

The card itself is card.md.jinja; here is what it tells.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from contrastive.data.tokenizer import Tokenizer
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.parity import Check
from contrastive.interop.run_record import RunRecord, public_name
from contrastive.models import DualEncoder, ImageClassifier, TextModel

POOLS = {
    "class": "class token",
    "average": "mean of tokens",
    "attention": "attention head (MAP)",
    "eos": "end-of-text token",
    "last": "last position",
}
PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm", "onnx": "onnxruntime"}


def model_card(
    bundle: Bundle, to: str, folder: Path, name: str, checks: Sequence[Check], notes: Sequence[str] = ()
) -> str:
    """Return the card.

    Args:
        to: the format. folder: as written in it. name: ORG/NAME or the folder's own name.
        checks: of the parity check. notes: what the format could not take along.
    """
    from jinja2 import Environment, StrictUndefined

    model, run = bundle.model, RunRecord.of(bundle.path)
    parts = {"preprocessing options": bundle.preprocess, "tokenizer": bundle.tokenizer}
    strict = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    template = strict.from_string((files("contrastive.interop") / "card.md.jinja").read_text("utf-8"))
    return template.render(
        **_of_format(to, folder),
        **_of_towers(bundle),
        **({} if run is None else _of_run(run)),
        to=to,
        name=name,
        bundle=bundle,
        model=model,
        kind=_kind(model, to),
        has_bias=getattr(model, "logit_bias", None) is not None,
        lacking=[what for what, part in parts.items() if isinstance(part, Absent)],
        run=run,
        source=public_name(str(bundle.path)),
        checks=[(check.what, check.kind, *check.written) for check in checks],
        notes=notes,
        package=PACKAGES[to],
        today=f"{datetime.now(UTC):%Y-%m-%d}",
        version=_version,
        millions=_millions,
        public_name=public_name,
    )


def _kind(model: nn.Module, to: str) -> str:
    """'dual', 'text', 'classifier' or 'image': transformers has no class for our head, and gets the tower alone."""
    if isinstance(model, ImageClassifier):
        return "image" if to == "transformers" else "classifier"
    return "dual" if isinstance(model, DualEncoder) else "text" if isinstance(model, TextModel) else "image"


def _of_format(to: str, folder: Path) -> dict[str, Any]:
    """What the code that loads it needs beside its name."""
    if to == "onnx":
        return {"onnx_example": (files("contrastive.interop.formats") / "onnx_example.py").read_text("utf-8").strip()}
    if to != "timm":
        return {}
    config = json.loads((folder / "config.json").read_text())
    arguments = {**config.get("model_args", {}), "num_classes": config.get("num_classes", 0)}
    return {"architecture": config["architecture"], "arguments": arguments, "repr": repr}


def _of_run(run: RunRecord) -> dict[str, Any]:
    return {
        "results": [(result.task, result.data, *result.written) for result in run.results],
        "options": yaml.safe_dump(run.public_options(), sort_keys=False, width=110).strip(),
    }


def _of_towers(bundle: Bundle) -> dict[str, Any]:
    """The table of the architecture: a column for each tower, a row for each fact that one of them has."""
    towers = {name: getattr(bundle.model, f"{name}_tower", None) for name in ("image", "text")}
    told = {name: dict(_tower(name, tower, bundle)) for name, tower in towers.items() if tower is not None}
    facts = dict.fromkeys(fact for column in told.values() for fact in column)
    rows = [(fact, *(column.get(fact, "") for column in told.values())) for fact in facts]
    return {"tower_names": [f"{name} tower" for name in told], "tower_facts": rows}


def _tower(name: str, tower: nn.Module, bundle: Bundle) -> Iterable[tuple[str, str]]:
    config = tower.config
    yield "parameters", _millions(tower)
    if name == "image":
        yield "input", f"{' × '.join(map(str, tower.input_size))} pixels, patches of {config.patch_size}"
    else:
        yield "input", f"{config.context_length} tokens of {config.vocab_size:,}"
    yield "width, depth, heads, MLP", f"{config.width}, {config.depth}, {config.num_heads}, {config.mlp_dim}"
    yield "pooling", POOLS[config.pool]
    yield "activation", config.activation
    if name == "image":
        yield "positions", config.position
        if bundle.preprocess is not None and not isinstance(bundle.preprocess, Absent):
            options = bundle.preprocess.config
            how = {"squash": "squashed", "crop": "short side scaled, centre cut"}[options.resize]
            yield "preprocessing", f"{how}, {options.interpolation}; mean {options.mean}, std {options.std}"
    else:
        yield "attention", "causal" if config.causal else "both ways"
        yield "tokenizer", _tokenizer(bundle.tokenizer)


def _tokenizer(tokenizer: Tokenizer | Absent | None) -> str:
    if tokenizer is None or isinstance(tokenizer, Absent):
        return "none in this folder"
    kind = {"bpe": "BPE trained on its captions", "clip": "CLIP's BPE"}.get(tokenizer.kind, "of its own folder")
    return kind if tokenizer.clean == "none" else f"{kind}, texts cleaned first ({tokenizer.clean})"


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.2f} M"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
