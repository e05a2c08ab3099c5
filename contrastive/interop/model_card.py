"""README.md of an exported model: what it is, where it comes from, what it scores, how its library loads it.

The card itself is card.md.jinja; here is what it tells.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.parity import Check
from contrastive.interop.run_record import RunRecord, public_name
from contrastive.models import DualEncoder, ImageClassifier, TextModel
from contrastive.page import filled

PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm", "onnx": "onnxruntime"}


def model_card(
    bundle: Bundle, to: str, folder: Path, name: str, checks: Sequence[Check], notes: Sequence[str] = ()
) -> str:
    """Return the card.

    Args:
        to: the format. folder: as written in it. name: ORG/NAME or the folder's own name.
        checks: of the parity check. notes: what the format could not take along.
    """
    model, run = bundle.model, RunRecord.of(bundle.path)
    named = {name: getattr(model, f"{name}_tower", None) for name in ("image", "text")}
    towers = {name: tower for name, tower in named.items() if tower is not None}
    parts = {"preprocessing options": bundle.preprocess, "tokenizer": bundle.tokenizer}
    return filled(
        files("contrastive.interop") / "card.md.jinja",
        **_of_format(to, folder),
        **({} if run is None else _of_run(run)),
        to=to,
        name=name,
        bundle=bundle,
        model=model,
        towers=towers,
        configs=[tower.config for tower in towers.values()],
        **named,
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
    if to == "transformers":
        file = folder / "tokenizer_config.json"
        return {
            "tokenizer_class": json.loads(file.read_text())["tokenizer_class"] if file.exists() else "AutoTokenizer"
        }
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


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.2f} M"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
