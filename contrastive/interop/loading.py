"""`contrastive.load`: a model out of any folder that we can read."""

import importlib
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from contrastive.errors import UserError, did_you_mean
from contrastive.interop.bundle import Bundle, load_native, native_folder
from contrastive.interop.hub import fetch, is_hub_name
from contrastive.models import model_config

# Each has a module formats/NAME_folder.py: `recognises(folder) -> bool`, `load(folder, with_tokenizer) -> Bundle`. They
# are asked in this order: a folder can hold the files of several libraries, and then the first says the most about the
# model.
FOREIGN = ("open_clip", "timm", "transformers")


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a model with its preprocessing and tokenizer.

    Args:
        path: a run folder (its final model is taken, else its newest whole checkpoint), one of its checkpoints, or a
            model folder: ours, or of transformers, open_clip or timm; or hf-hub:ORG/NAME@REVISION, of which only
            JSON, safetensors and vocabularies are fetched. Without a REVISION, the commit it came to is printed.

    Returns:
        The model in float32 and eval mode on `device`. A part whose files the folder lacks is `Absent`: the model
        loads, and any use of the part says what is missing.

    Raises:
        UserError: no model there, an architecture that is not ours, a damaged file, weights that do not fit, or no such
            device.
    """
    device = usable(device)
    bundle = read(path)
    bundle.model.eval().to(device)
    return bundle


def usable(device: str | torch.device) -> torch.device:
    """Return the device; UserError, with those that are here, where torch cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError):
        kind = torch.accelerator.current_accelerator()
        here = [f"{kind.type}:{n}" for n in range(torch.accelerator.device_count())] if kind else []
        raise UserError(f"device '{device}' is not here; there is {', '.join(['cpu', *here])}") from None


def read(path: str | Path, with_tokenizer: bool = True) -> Bundle:
    """As `load`, on the CPU. Without the tokenizer (it is `Absent` then) no model code of transformers is imported."""
    if is_hub_name(path):
        folder, pinned = fetch(str(path))
        return replace(read_folder(folder, with_tokenizer), path=Path(pinned))
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"no model at {path}: no such file or folder{_what_is_meant(path, folder)}")
    lone_weights = folder.suffix == ".safetensors" and not any(folder.parent.glob("*config.json"))
    if folder.is_file() and not lone_weights:  # timm's reader says what a file of weights alone lacks
        raise UserError(f"no model at {path}: that is a file; give its folder, {folder.parent}")
    return read_folder(folder, with_tokenizer)


def _what_is_meant(path: str | Path, folder: Path) -> str:
    """A hint at what a path that is not there was meant to be; empty without an idea."""
    on_hub = f". For the hub: hf-hub:{path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
    with suppress(UserError):
        model_config(str(path))
        made = f"contrastive.create_model('{path}') makes it, with random weights"
        return on_hub or f". That is an architecture: {made}; with weights: hf-hub:ORGANISATION/NAME"
    if folder.parent.is_dir():
        hint = did_you_mean(folder.name, (other.name for other in folder.parent.iterdir()))
        return f".{hint}" if hint else ""
    return on_hub


def read_folder(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """As `read`, of a folder that is there."""
    own = native_folder(folder)
    if own is not None:
        return load_native(own, with_tokenizer)
    for name in FOREIGN:
        library = importlib.import_module(f"contrastive.interop.formats.{name}_folder")
        if library.recognises(folder):
            return library.load(folder, with_tokenizer)
    if any(folder.glob("*.onnx")):
        raise UserError(f"{folder} holds ONNX graphs, which are for onnxruntime alone: load what they were made from")
    raise UserError(
        f"no model at {folder}: neither a run (final/ or checkpoints/) nor a model folder of ours, transformers, "
        "open_clip or timm (config.json or open_clip_config.json beside safetensors)"
    )
