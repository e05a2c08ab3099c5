"""A trained model and its caption decoder, read back from the folder of a run, a checkpoint or a final model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from contrastive.config import from_dict
from contrastive.data.tokenizer import Tokenizer, load_tokenizer
from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.bundle import Bundle, build, fill_model, native_folder, newest_whole, tensors_in
from contrastive.interop.loading import load
from contrastive.log import say
from contrastive.models.caption_decoder import CaptionDecoder
from contrastive.models.encoders import unit_length
from contrastive.models.generate import GenerationConfig, generate
from contrastive.objectives.caption import CaptionConfig, decoder_for
from contrastive.objectives.learner import PREFIX
from contrastive.patches import Patches

NAME = "caption"


@dataclass(frozen=True)
class Captioner:
    """What writes captions, and says how likely they are. Both modules are in eval mode, on one device."""

    bundle: Bundle
    decoder: CaptionDecoder
    tokenizer: Tokenizer
    """Whose captions the decoder writes; a bundle of an image tower alone has none."""

    def patches(self, pixels: torch.Tensor | Patches) -> torch.Tensor:
        """What the decoder sees of images (B, 3, H, W), normalised, or Patches: (B, N, D)."""
        return self.bundle.model.image_tower.forward_features(pixels)

    def own_tokens(self, pixels: torch.Tensor | Patches) -> torch.Tensor | None:
        """Which of `patches` are no padding, bool (B, N); None: all."""
        return self.bundle.model.image_tower.own_tokens(pixels)

    def write(
        self, pixels: torch.Tensor | Patches, how: GenerationConfig, numbers: Sequence[int]
    ) -> tuple[list[str], list[float]]:
        """Return a caption of each image and its log-likelihood in nats; arguments as of `patches` and `generate`."""
        patches, own = self.patches(pixels), self.own_tokens(pixels)
        attempts = [generate(self.decoder, patches, how, numbers, attempt, own) for attempt in range(how.best_of)]
        texts = [list(map(self.tokenizer.decode, ids.cpu())) for ids, _ in attempts]
        best = [0] * len(numbers)
        if how.best_of > 1:
            model = self.bundle.model
            image = unit_length(model.image_tower.pooled(patches, images=pixels))
            tokens = (self.tokenizer(some).to(patches.device) for some in texts)
            likeness = torch.stack([(image * model.encode_text(some)).sum(dim=1) for some in tokens])
            best = likeness.argmax(dim=0).tolist()
        scores = [score.tolist() for _, score in attempts]
        return [texts[k][row] for row, k in enumerate(best)], [scores[k][row] for row, k in enumerate(best)]


def load_captioner(path: str | Path, device: str | torch.device = "cpu") -> Captioner:
    """Load a model with its decoder.

    Args:
        path: a run folder, a checkpoint, or a final model whose run kept its decoder (`objectives.caption.keep`). Of a
            run that did not, the newest checkpoint is taken.

    Raises:
        UserError: as `contrastive.load`; or there is no decoder, a damaged one, or one that does not fit.
    """
    run = Path(path).expanduser()
    folder = native_folder(run) if run.is_dir() else None
    if folder is not None and folder.parent == run and not _kept(folder) and (run / "checkpoints").is_dir():
        newest, _ = newest_whole(run / "checkpoints")
        if newest is not None and _kept(newest):
            say(f"{folder} has no caption decoder: {newest} is taken")
            path = newest
    return captioner_of(load(path, device), device)


def captioner_of(bundle: Bundle, device: str | torch.device) -> Captioner:
    """Return the model with the decoder that lies beside it; UserError as `load_captioner`."""
    bundle.check_image_tower("there is nothing to caption")
    if not _kept(bundle.path):
        raise UserError(
            f"{bundle.path} has no caption decoder: train with --objectives caption, and keep it in the final model "
            "with --objectives.caption.keep; checkpoints have it anyway"
        )
    where = _description(bundle.path)
    options = from_dict(CaptionConfig, read_json(where)[NAME], str(where))
    file = where.parent / "ema.safetensors"  # as of the model itself
    if not file.exists():
        file = where.parent / "model.safetensors"
    prefix = f"{PREFIX}{NAME}.decoder."
    weights = {name.removeprefix(prefix): t for name, t in tensors_in(file).items() if name.startswith(prefix)}
    width, tokenizer = bundle.config.image.width, bundle.tokenizer or load_tokenizer(bundle.path / "tokenizer")
    decoder = build(lambda: decoder_for(options, width, tokenizer), weights, file)
    fill_model(decoder, weights, file)
    return Captioner(bundle, decoder.eval().to(device), tokenizer)


def _description(folder: Path) -> Path:
    return folder / "objectives" / "config.json"


def _kept(folder: Path) -> bool:
    return _description(folder).is_file() and NAME in read_json(_description(folder))
