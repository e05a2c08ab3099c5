"""A loaded model with all that belongs to it, and our own folder of one: what runs write and `contrastive.load` reads.

model.safetensors   weights, float32, by parameter name
ema.safetensors     averaged weights, where the run kept them; they are what `load` uses
config.json         architecture and preprocessing; of a classifier the class names too
tokenizer/          as data.tokenizer saves it; a classifier has none, an image tower alone that of its caption decoder
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from contrastive.config import from_dict
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.errors import UserError, reason_of
from contrastive.files import problem, read_json, write_json
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageModel,
    ImageModelConfig,
    ImageTowerConfig,
    ModelConfig,
    TextModel,
    TextModelConfig,
)
from contrastive.option_types import as_option
from contrastive.words import no_attribute

M = TypeVar("M", bound=nn.Module)
FORMAT = "contrastive-1"
_KINDS = {
    FORMAT: (ModelConfig, DualEncoder),
    "contrastive-classifier-1": (ClassifierConfig, ImageClassifier),
    "contrastive-image-1": (ImageModelConfig, ImageModel),
}


class Absent:
    """Stands for a part that a folder should have and has not: false, and any use of it is a UserError that says so."""

    def __init__(self, message: str):
        self._message = message

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args, **kwargs):
        raise UserError(self._message)

    def __getattr__(self, name: str):
        if name.startswith("_"):  # what copy, pickle and torch ask of any object
            raise AttributeError(name)
        raise UserError(self._message)


NOT_LOADED = Absent("the tokenizer was not asked for; contrastive.load(PATH) loads it")


@dataclass(frozen=True)
class Bundle:
    """A model with all that belongs to it."""

    model: DualEncoder | ImageClassifier | ImageModel | TextModel
    # Any is for Absent and None: what most models have is used without asking first, by type checkers' leave too.
    preprocess: Preprocess | Any
    """PIL image to (3, H, W) float32; None for a text tower alone."""
    tokenizer: Tokenizer | Any
    """List of str to (B, context_length) int64; None without a text tower."""
    config: ModelConfig | ClassifierConfig | ImageModelConfig | TextModelConfig
    path: Path
    class_names: tuple[str, ...] | None = None
    """Of a classifier, in the order of its scores, where its data named them."""

    def __getattr__(self, name: str):
        raise no_attribute("bundle", self, name)

    def check_text_tower(self, purpose: str) -> None:
        """Raise UserError where there is no text tower; `purpose` says in the message what needs one."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no text tower: {purpose}")

    def check_image_tower(self, purpose: str) -> None:
        """Raise UserError where there is no image tower; `purpose` says in the message what needs one."""
        if self.preprocess is None:
            raise UserError(f"{self.path} has no image tower: {purpose}")


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig | ClassifierConfig | ImageModelConfig,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer | None = None,
    ema: Mapping[str, torch.Tensor] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Write a model into an existing folder, so that `load` finds it.

    Args:
        tokenizer: of a dual encoder; of an image tower alone its caption decoder's.
        class_names: of a classifier.

    Raises:
        UserError: `set_input_size` changed the image tower and its config does not know.
    """
    _check_patches(config.image, preprocess, f"{folder}: the model")
    positions = weights.get("image_tower.position_embedding")
    expected = config.image.num_patches + config.image.class_token
    if positions is not None and len(positions) != expected:
        raise UserError(
            f"the image tower has {len(positions)} positions, its config of {config.image.image_size} pixels asks for "
            f"{expected}: after set_input_size save it with image=model.image_tower.config"
        )
    for name, tensors in (("model", weights), ("ema", ema)):
        if tensors is not None:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, folder / f"{name}.safetensors")
    written_as = next(name for name, (options, _) in _KINDS.items() if isinstance(config, options))
    described = {"format": written_as, "model": asdict(config), "preprocess": asdict(preprocess)}
    if isinstance(config, ClassifierConfig):
        described["class_names"] = class_names
    write_json(folder / "config.json", described)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


def _check_patches(image: ImageTowerConfig, preprocess: PreprocessConfig, where: str) -> None:
    """Raise UserError where images are made into patches that the tower cannot take."""
    if preprocess.resize != "native":
        return
    if not image.native:
        raise UserError(
            f"{where} has preprocess.resize 'native', which makes patches of images of any shape, and an image tower "
            "of squares: set model.image.native true, or preprocess.resize 'squash'"
        )
    if preprocess.patch_size != image.patch_size:
        raise UserError(
            f"{where} has preprocess.patch_size {preprocess.patch_size} and model.image.patch_size {image.patch_size}: "
            "set both alike"
        )


def is_native(folder: Path) -> bool:
    """Whether `folder` is a model folder of ours."""
    try:
        return json.loads((folder / "config.json").read_text()).get("format") in tuple(_KINDS)
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def load_native(folder: Path, with_tokenizer: bool) -> Bundle:
    """Load one of our model folders: the model in eval mode on the CPU.

    Raises:
        UserError: a damaged file, or weights that do not fit the architecture.
    """
    # Before anything is read: safetensors with a flipped bit load without a word, only the manifest's sums tell.
    wrong = problem(folder)
    if wrong is not None:
        raise UserError(f"{folder} is not a whole model folder: {wrong}")
    description = read_json(folder / "config.json")
    where = str(folder / "config.json")
    options, kind = _KINDS.get(str(description.get("format")), _KINDS[FORMAT])
    config = from_dict(options, description.get("model"), where)
    # A run that keeps averaged weights is judged by them: its evaluations are of these.
    file = folder / "ema.safetensors"
    if not file.exists():
        file = folder / "model.safetensors"
    weights = tensors_in(file)
    model = build(lambda: kind(config), weights, file)
    fill_model(model, weights, file)
    if kind is not DualEncoder:
        tokenizer = None
    elif with_tokenizer:
        tokenizer = load_tokenizer(folder / "tokenizer", config.text.context_length)
        if tokenizer.vocab_size > config.text.vocab_size:
            raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, more than its text tower knows")
    else:
        tokenizer = NOT_LOADED
    preprocess = from_dict(PreprocessConfig, description.get("preprocess"), where)
    _check_patches(config.image, preprocess, where)
    names = as_option(f"{where}: class_names", tuple[str, ...] | None, description.get("class_names"))
    return Bundle(
        model=model.eval(),
        preprocess=Preprocess(preprocess),
        tokenizer=tokenizer,
        config=config,
        path=folder,
        class_names=names,
    )


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; UserError where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {file}: {error}") from None


def build(make: Callable[[], M], weights: Mapping[str, torch.Tensor], where: Path) -> M:
    """Return the model that `make` makes, if it is no larger than the weights that are there for it.

    Raises:
        UserError: its config asks for one that would take all memory, or cannot be.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    try:
        with torch.device("meta"):
            asked = sum(parameter.numel() for parameter in make().parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{where}: no model can be made as its config asks: {reason_of(error)}") from None
    if asked > 2 * held + 2**20:
        raise UserError(f"{where} has {held:,} weights, its config asks for {asked:,}: copy both again")
    return make()


def fill_model(model: nn.Module, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Fill the model from weights that `file` held, every key and shape exactly; otherwise UserError."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # which names every key, on a line each
        raise UserError(f"{file} does not fit the model: {textwrap.shorten(str(error), 400)}") from None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, damaged ones too, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint folder that verifies, and what was wrong with those passed over."""
    passed = []
    # The newest may be the one that a crash or a full disk spoilt; the one before it is whole then.
    for folder in reversed(checkpoints_in(checkpoints)):
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
    for final in (path / "final", path / ".old-final"):  # a kill may have come while it was replaced
        if (final / "config.json").exists():
            return final
    if not (path / "checkpoints").is_dir():
        return None
    newest, passed = newest_whole(path / "checkpoints")
    if newest is None:
        raise UserError(f"no model at {path}: {'; '.join(passed) or 'no checkpoint yet'}")
    return newest


def weights_key(model: nn.Module) -> str:
    """Return the sha256, in hex, of all parameters and buffers: name, dtype, shape and bytes of each.

    The same weights have the same key on every device and in every folder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
