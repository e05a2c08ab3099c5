"""Our own model folder: weights, architecture, preprocessing and tokenizer together.

model.safetensors   weights, float32, by parameter name
ema.safetensors     averaged weights, where the run kept them; they are what `load` uses
config.json         architecture and preprocessing; of a classifier the class names too
tokenizer/          as data.tokenizer saves it; a classifier has none
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from contrastive.config import from_dict
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.errors import UserError
from contrastive.interop.manifest import problem
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ModelConfig

FORMAT = "contrastive-1"
CLASSIFIER_FORMAT = "contrastive-classifier-1"


@dataclass(frozen=True)
class Bundle:
    """A model with all that belongs to it."""

    model: DualEncoder | ImageClassifier
    preprocess: Preprocess
    """PIL image to (3, H, W) float32."""
    tokenizer: Tokenizer | None
    """List of str to (B, context_length) int64; None for a classifier."""
    config: ModelConfig | ClassifierConfig
    path: Path
    class_names: tuple[str, ...] | None = None
    """Of a classifier, in the order of its scores, where its data named them."""

    def check_text_tower(self, purpose: str) -> None:
        """Raise UserError where there is no text tower; `purpose` says in the message what needs one."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} is a classifier, without a text tower: {purpose}")


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model into an existing folder, so that `load` finds it."""
    _save_weights(folder, weights, ema)
    description = {"format": FORMAT, "model": asdict(config), "preprocess": asdict(preprocess)}
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    tokenizer.save(folder / "tokenizer")


def save_classifier(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ClassifierConfig,
    preprocess: PreprocessConfig,
    class_names: tuple[str, ...] | None,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a classifier into an existing folder, so that `load` finds it."""
    _save_weights(folder, weights, ema)
    description = {
        "format": CLASSIFIER_FORMAT,
        "model": asdict(config),
        "preprocess": asdict(preprocess),
        "class_names": class_names,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=1))


def _save_weights(folder: Path, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None) -> None:
    for name, tensors in (("model", weights), ("ema", ema)):
        if tensors is not None:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, folder / f"{name}.safetensors")


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a model, a classifier too, from a run folder, one of its checkpoints, or its final model.

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
    kind = description.get("format")
    if kind not in (FORMAT, CLASSIFIER_FORMAT):
        raise UserError(f"{folder / 'config.json'} is not of a contrastive model (no format '{FORMAT}')")
    is_classifier, where = kind == CLASSIFIER_FORMAT, str(folder / "config.json")
    config = from_dict(ClassifierConfig if is_classifier else ModelConfig, description["model"], where)
    model = ImageClassifier(config) if is_classifier else DualEncoder(config)
    weights = folder / "ema.safetensors"
    if not weights.exists():
        weights = folder / "model.safetensors"
    load_weights(model, weights)
    preprocess = from_dict(PreprocessConfig, description["preprocess"], where)
    names = description.get("class_names")
    return Bundle(
        model=model.eval().to(device),
        preprocess=Preprocess(preprocess),
        tokenizer=None if is_classifier else load_tokenizer(folder / "tokenizer", config.text.context_length),
        config=config,
        path=folder,
        class_names=None if names is None else tuple(names),
    )


def load_weights(model: nn.Module, file: Path) -> None:
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
