"""A model out into another library's format: written aside, checked against the model, then renamed.

With it goes a card, README.md: what the model is, where it comes from, what it scores, how its library loads it. The
card itself is card.md.jinja.
"""

import copy
import importlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from contrastive.errors import UserError, did_you_mean, reason_of
from contrastive.files import check_writable, write_new_folder
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.loading import PREFIX, check_repo, load
from contrastive.interop.parity import Check, Probe, compare
from contrastive.interop.run_record import RunRecord, public_name
from contrastive.models import DualEncoder, ImageClassifier, TextModel
from contrastive.page import filled

PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch", "timm": "timm", "onnx": "onnxruntime"}
"""The formats, and what has to be installed to read one."""
FORMATS = tuple(PACKAGES)


@dataclass(frozen=True)
class Exported:
    """What an export has to say."""

    folder: Path
    checks: list[Check]
    notes: list[str]
    """What the format could not take along, in plain sentences."""


def export(
    source: Bundle | str | Path,
    to: str,
    out: str | Path,
    name: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Exported:
    """Write a model as a folder of `to`, which that library loads as it is, with a model card.

    The library itself reads the folder back, and only one that says what the model says gets its name. The weights
    are those that `load` takes: of a run with a moving average, the averaged ones.

    Args:
        source: a loaded model, or anything that `load` reads.
        to: 'transformers', 'open_clip', 'timm' or 'onnx'.
        out: the folder, new or empty.
        name: ORG/NAME of the hub repository that it is for, as the card's code should call it; none: the folder's.
        on_step: told what is being done.

    Raises:
        UserError: `out` has something in it, an unknown format, a model that the format cannot express, a package
            that is not installed, or a failed check; nothing is written then.
    """
    writing, out = _format(to), Path(out).expanduser()
    place = check_out(out)
    bundle = _as_loaded(source if isinstance(source, Bundle) else load(source))
    if bundle.path.name in ("", ".."):  # '.' says nothing to a reader of the card
        bundle = replace(bundle, path=bundle.path.resolve())

    def fill(temporary: Path) -> Exported:
        on_step(f"writing for {to}")
        notes = writing.write(bundle, temporary, out)
        on_step(f"checking with {to}")
        checks = _check(bundle, writing, temporary, notes, to)
        # The card travels, the notes are also for the terminal: the card calls folders by name, not by place.
        of_card = notes
        for lies, called in ((out, out.name), (bundle.path, public_name(str(bundle.path)))):
            of_card = [note.replace(str(lies), called) for note in of_card]
        card = temporary / "README.md"
        card.write_text(_model_card(bundle, to, temporary, name or out.name, checks, of_card), encoding="utf-8")
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors are for their owner alone; the folder is for others
                file.chmod(card.stat().st_mode)
        return Exported(out, checks, notes)

    return write_new_folder(place, fill)


def push_export(folder: Path, to: str, repo: str, private: bool = False) -> str:
    """Push an exported folder to ORG/NAME; return the address of the commit.

    Files that name the place of the folder name the repository there.

    Raises:
        UserError: no right to write there, or no network; the folder stays as it is.
    """
    writing = _format(to)
    if not hasattr(writing, "retarget"):
        return _push(folder, folder, repo, private)
    # What names the folder's place is changed in a copy; the weights, which may be large, are only linked.
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if file.suffix == ".json":
                shutil.copy(file, place)
            else:
                (Path(place) / file.name).symlink_to(file.resolve())
        writing.retarget(Path(place), f"{PREFIX}{repo}")
        return _push(Path(place), folder, repo, private)


def _push(folder: Path, named: Path, repo: str, private: bool) -> str:
    """Upload a folder, called `named` in messages, to ORG/NAME, which is made where it does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Exported by contrastive"))
    except Exception as error:  # no network: another class for every client and reason
        reason = reason_of(error)
        if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403):
            reason = "the token may not write there: log in with `hf auth login`, or set HF_TOKEN to one that may"
    raise UserError(f"{named} is written, but not pushed to {repo}: {reason}; then: hf upload {repo} {named}")


def check_push(repo: str) -> None:
    """Raise UserError where `push_export` to `repo` cannot work, before any work is done."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    check_repo(repo, f"--push {repo}")
    if is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise UserError(f"--push {repo}: not logged in to the hub; use `hf auth login`, or set HF_TOKEN")


def check_out(out: Path) -> Path:
    """Return the folder that `out` stands for, links followed.

    Raises:
        UserError: it can neither be made nor is it there and empty, or `out` ends in no name of its own, as '.' does.
    """
    out = out.expanduser()
    if out.name in ("", ".."):
        raise UserError(f"'{out}' is no name of a folder to be made: name one, as {out / 'exported'}")
    try:
        place = out.resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise UserError(f"cannot write to {out}: its links lead nowhere; name another folder") from None
    if (place.exists() and not place.is_dir()) or (place.is_dir() and any(place.iterdir())):
        raise UserError(f"{out} exists and is not empty; nothing is overwritten: name another folder")
    if place == Path.cwd():  # it would be renamed away from under the user
        raise UserError(f"{out} is the folder that you are in: name another")
    check_writable(place.parent, "name another folder")
    return place


def _format(to: str):
    if to not in FORMATS:
        raise UserError(f"unknown format '{to}'.{did_you_mean(to, FORMATS)} Known: {', '.join(FORMATS)}")
    return importlib.import_module(f"contrastive.interop.formats.{to}_folder")


def _as_loaded(bundle: Bundle) -> Bundle:
    """The bundle as `load` gives it: a copy in float32, eval mode and on the CPU where it is something else."""
    model = bundle.model
    tensors = [*model.parameters(), *model.buffers()]
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    if plain and not any(module.training for module in model.modules()):
        return bundle
    return replace(bundle, model=copy.deepcopy(model).to("cpu", torch.float32).eval())


def _check(bundle: Bundle, writing, folder: Path, notes: list[str], to: str) -> list[Check]:
    """All checks of the folder; UserError, naming the first that failed, when not all passed."""
    probe = Probe.of(bundle)
    checks = compare(bundle, probe, partial(writing.outputs, folder))
    if hasattr(writing, "half_outputs"):
        checks += compare(bundle, probe, partial(writing.half_outputs, folder), half=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        found, limit = failed[0].written
        more = f" and {len(failed) - 1} more checks failed" if len(failed) > 1 else ""
        about = f"; of this format: {'; '.join(notes)}" if notes else ""
        raise UserError(
            f"nothing was written: read back by {to}, the {failed[0].what} are not the model's "
            f"({failed[0].kind} {found}, needed {limit}){more}{about}"
        )
    if not any(check.what.endswith("embeddings") for check in checks):
        raise UserError(f"nothing was written: {to} gave no embeddings to compare with the model's")
    return checks


def _model_card(bundle: Bundle, to: str, folder: Path, name: str, checks: Sequence[Check], notes: Sequence[str]) -> str:
    """Return the card.

    Args:
        to: the format. folder: as written in it. name: ORG/NAME or the folder's own name.
        checks: of the parity check. notes: what the format could not take along.
    """
    model, run = bundle.model, RunRecord.of(bundle.path)
    named = {name: getattr(model, f"{name}_tower", None) for name in ("image", "text")}
    towers = {name: tower for name, tower in named.items() if tower is not None}
    parts = {"preprocessing options": bundle.preprocess, "tokenizer": bundle.tokenizer}
    of_run = {}
    if run is not None:
        of_run["results"] = [(result.task, result.data, *result.written) for result in run.results]
        of_run["options"] = yaml.safe_dump(run.public_options(), sort_keys=False, width=110).strip()
    return filled(
        files("contrastive.interop") / "card.md.jinja",
        **_of_format(to, folder),
        **of_run,
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


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.2f} M"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
