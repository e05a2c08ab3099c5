"""A model out into another library's format: written aside, checked against the model, then renamed."""

import copy
import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from contrastive.errors import UserError, did_you_mean
from contrastive.files import check_writable, write_new_folder
from contrastive.interop.bundle import Bundle
from contrastive.interop.hub import PREFIX, push
from contrastive.interop.loading import load
from contrastive.interop.model_card import model_card
from contrastive.interop.parity import Check, Probe, compare
from contrastive.interop.run_record import public_name

FORMATS = ("transformers", "open_clip", "timm", "onnx")


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
    bundle = _with_name(_as_loaded(source if isinstance(source, Bundle) else load(source)))
    exported = []

    def fill(temporary: Path) -> None:
        on_step(f"writing for {to}")
        notes = writing.write(bundle, temporary, out)
        on_step(f"checking with {to}")
        checks = _check(bundle, writing, temporary, notes, to)
        # The card travels, the notes are also for the terminal: the card calls folders by name, not by place.
        of_card = notes
        for lies, called in ((out, out.name), (bundle.path, public_name(str(bundle.path)))):
            of_card = [note.replace(str(lies), called) for note in of_card]
        card = temporary / "README.md"
        card.write_text(model_card(bundle, to, temporary, name or out.name, checks, of_card), encoding="utf-8")
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors are for their owner alone; the folder is for others
                file.chmod(card.stat().st_mode)
        exported.append(Exported(out, checks, notes))

    write_new_folder(place, fill)
    return exported[0]


def push_export(folder: Path, to: str, repo: str, private: bool = False) -> str:
    """Push an exported folder to ORG/NAME; return the address of the commit. UserError as `hub.push`.

    Files that name the place of the folder name the repository there.
    """
    writing = _format(to)
    if not hasattr(writing, "retarget"):
        return push(folder, folder, repo, private)
    # What names the folder's place is changed in a copy; the weights, which may be large, are only linked.
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if file.suffix == ".json":
                shutil.copy(file, place)
            else:
                (Path(place) / file.name).symlink_to(file.resolve())
        writing.retarget(Path(place), f"{PREFIX}{repo}")
        return push(Path(place), folder, repo, private)


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


def _with_name(bundle: Bundle) -> Bundle:
    """The bundle with a path that ends in a name: '.' says nothing to a reader of the card."""
    return replace(bundle, path=bundle.path.resolve()) if bundle.path.name in ("", "..") else bundle


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
