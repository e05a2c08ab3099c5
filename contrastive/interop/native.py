"""Our own model folder: weights, architecture, preprocessing and tokenizer together.

model.safetensors   weights, float32, by parameter name
ema.safetensors     averaged weights, where the run kept them; they are what `load` uses
config.json         architecture and preprocessing; of a classifier the class names too
tokenizer/          as data.tokenizer saves it; a classifier has none
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from contrastive.config import from_dict
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.errors import UserError
from contrastive.files import problem
from contrastive.interop.bundle import NOT_LOADED, Bundle
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ImageTowerConfig, ModelConfig

FORMAT = "contrastive-1"
CLASSIFIER_FORMAT = "contrastive-classifier-1"


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer,
    ema: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model into an existing folder, so that `load` finds it."""
    _check_size(weights, config.image)
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
    _check_size(weights, config.image)
    _save_weights(folder, weights, ema)
    description = {
        "format": CLASSIFIER_FORMAT,
        "model": asdict(config),
        "preprocess": asdict(preprocess),
        "class_names": class_names,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=1))


def _check_size(weights: Mapping[str, torch.Tensor], image: ImageTowerConfig) -> None:
    """Raise UserError where `set_input_size` has changed a tower and the config of its model does not know."""
    positions = weights.get("image_tower.position_embedding")
    expected = image.num_patches + image.class_token
    if positions is not None and len(positions) != expected:
        raise UserError(
            f"the image tower has {len(positions)} positions, its config of {image.image_size} pixels asks for "
            f"{expected}: after set_input_size save it with image=model.image_tower.config"
        )


def _save_weights(folder: Path, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None) -> None:
    for name, tensors in (("model", weights), ("ema", ema)):
        if tensors is not None:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, folder / f"{name}.safetensors")


def is_native(folder: Path) -> bool:
    """Whether `folder` is a model folder of ours."""
    try:
        return json.loads((folder / "config.json").read_text()).get("format") in (FORMAT, CLASSIFIER_FORMAT)
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def load_native(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load one of our model folders: the model in eval mode on the CPU.

    Raises:
        UserError: a damaged file, or weights that do not fit the architecture.
    """
    wrong = problem(folder)
    if wrong is not None:
        raise UserError(f"{folder} is not a whole model folder: {wrong}")
    description = json.loads((folder / "config.json").read_text())
    is_classifier, where = description["format"] == CLASSIFIER_FORMAT, str(folder / "config.json")
    config = from_dict(ClassifierConfig if is_classifier else ModelConfig, description["model"], where)
    model = ImageClassifier(config) if is_classifier else DualEncoder(config)
    weights = folder / "ema.safetensors"
    if not weights.exists():
        weights = folder / "model.safetensors"
    load_weights(model, weights)
    if is_classifier:
        tokenizer = None
    elif with_tokenizer:
        tokenizer = load_tokenizer(folder / "tokenizer", config.text.context_length)
    else:
        tokenizer = NOT_LOADED
    preprocess = from_dict(PreprocessConfig, description["preprocess"], where)
    names = description.get("class_names")
    return Bundle(
        model=model.eval(),
        preprocess=Preprocess(preprocess),
        tokenizer=tokenizer,
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


def native_folder(path: Path) -> Path | None:
    """Return the model folder that `path` is or holds as a run: its final model, else its newest whole checkpoint.

    None where `path` is neither: a folder with a config of its own is a model of another library, whatever else lies in
    it.

    Raises:
        UserError: a run whose checkpoints are all damaged.
    """
    if is_native(path):
        return path
    if (path / "config.json").exists() or (path / "open_clip_config.json").exists():
        return None
    if (path / "final" / "config.json").exists():
        return path / "final"
    if not (path / "checkpoints").is_dir():
        return None
    newest, passed = newest_whole(path / "checkpoints")
    if newest is None:
        raise UserError(f"no model at {path}: {'; '.join(passed) or 'no checkpoint yet'}")
    return newest
