"""Our own model folder: weights, architecture, preprocessing and tokenizer together.

model.safetensors   weights, float32, by parameter name
ema.safetensors     averaged weights, where the run kept them; they are what `load` uses
config.json         architecture and preprocessing
tokenizer/          as data.tokenizer saves it
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from contrastive.config import from_dict
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.errors import UserError
from contrastive.interop.manifest import problem
from contrastive.models import DualEncoder, ModelConfig

FORMAT = "contrastive-1"


@dataclass(frozen=True)
class Bundle:
    """A model with all that belongs to it."""

    model: DualEncoder
    preprocess: Preprocess
    """PIL image to (3, H, W) float32."""
    tokenizer: Tokenizer
    """List of str to (B, context_length) int64."""
    config: ModelConfig
    path: Path


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model into an existing folder, so that `load` finds it."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    if ema is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in ema.items()}, folder / "ema.safetensors")
    description = {"format": FORMAT, "model": asdict(config), "preprocess": asdict(preprocess)}
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    tokenizer.save(folder / "tokenizer")


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a model from a run folder, one of its checkpoints, or its final model.

    Of a run folder the final model is taken, else the newest checkpoint that is whole.

    Returns:
        The model in eval mode on `device`, with its preprocessing and tokenizer.

    Raises:
        UserError: no model there, a damaged file, or weights that do not fit the architecture.
    """
    folder = _model_folder(Path(path))
    try:
        description = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if description.get("format") != FORMAT:
        raise UserError(f"{folder / 'config.json'} is not of a contrastive model (no format '{FORMAT}')")
    config = from_dict(ModelConfig, description["model"], str(folder / "config.json"))
    model = DualEncoder(config)
    weights = folder / "ema.safetensors"
    if not weights.exists():
        weights = folder / "model.safetensors"
    load_weights(model, weights)
    preprocess = from_dict(PreprocessConfig, description["preprocess"], str(folder / "config.json"))
    return Bundle(
        model=model.eval().to(device),
        preprocess=Preprocess(preprocess),
        tokenizer=load_tokenizer(folder / "tokenizer", config.text.context_length),
        config=config,
        path=folder,
    )


def load_weights(model: DualEncoder, file: Path) -> None:
    """Fill the model from a safetensors file, every key and shape exactly; otherwise UserError."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {file}: {error}") from None
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        name, what = (missing[0], "lacks") if missing else (extra[0], "has an unknown")
        raise UserError(f"{file} does not fit the model: it {what} key '{name}'")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{file}: '{name}' is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}")
    model.load_state_dict(weights)


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint folder that verifies, and what was wrong with those passed over."""
    passed = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        wrong = problem(folder)
        if wrong is None:
            return folder, passed
        passed.append(f"{folder.name}: {wrong}")
    return None, passed


def _model_folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"no model at {path}: no such file or folder")
    if (path / "config.json").exists():
        return _whole(path)
    if (path / "final").exists():
        return _whole(path / "final")
    newest, passed = newest_whole(path / "checkpoints")
    if newest is None:
        why = "; ".join(passed) or "no config.json, no final/, no checkpoints/"
        raise UserError(f"no model at {path}: {why}")
    return newest


def _whole(folder: Path) -> Path:
    wrong = problem(folder)
    if wrong is not None:
        raise UserError(f"{folder} is not a whole model folder: {wrong}")
    return folder
