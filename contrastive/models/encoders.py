"""Models made of towers: the dual encoder, one tower alone, and the classifier."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import InitStyle, initialise_tower
from contrastive.models.text_tower import PackedTokens, TextTower, TextTowerConfig
from contrastive.option_types import Positive
from contrastive.patches import Patches
from contrastive.words import no_attribute


@dataclass(frozen=True)
class ModelConfig:
    """Options of the dual encoder."""

    embed_dim: Positive[int] = 768
    """Channels of the shared embedding space."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    init: InitStyle = "siglip"
    """Initialisation of the weights: as OpenAI's CLIP, as big_vision's SigLIP, or like that with mimetic attention,
    which starts near what trained towers have (Trockman & Kolter 2023): for few samples."""
    init_logit_scale: Positive[float | None] = None
    """Initial factor on the cosine similarities (10 for SigLIP, 14.3 for CLIP); none: as the loss prescribes."""
    init_logit_bias: float | None = None
    """Initial offset of the logits, for the sigmoid loss; none: as the loss prescribes."""

    def __getattr__(self, name: str) -> Any:
        raise no_attribute("model", self, name)


@dataclass(frozen=True)
class ImageModelConfig:
    """Options of an image tower alone."""

    embed_dim: int = 768
    """Channels of the embedding; the tower's width where it has no projection."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)


@dataclass(frozen=True)
class TextModelConfig:
    """Options of a text tower alone."""

    embed_dim: int = 768
    """Channels of the embedding; the tower's width where it has no projection."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)


@dataclass(frozen=True)
class ClassifierConfig:
    """Options of the classifier. The defaults are ViT-Base/16's, but for the number of classes."""

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    embed_dim: int | None = None
    """Channels that the head reads; none: the tower's width. Of use with model.image.projection."""
    num_classes: int | None = None
    """Classes; none: as many as the data has."""
    unit_features: bool = False
    """L2-normalise what the head reads, as a head made of text embeddings expects."""


class Features(NamedTuple):
    """What the loss needs of a batch."""

    image: torch.Tensor
    """(B, E), L2-normalised."""
    text: torch.Tensor
    """(B, E), L2-normalised."""
    logit_scale: torch.Tensor
    """Scalar, already exponentiated."""
    logit_bias: torch.Tensor | None
    """Scalar, or None for losses without a bias."""

    def __getattr__(self, name: str) -> Any:
        raise no_attribute("model", self, name)


class _Model(nn.Module):
    """An attribute that other libraries' models have, and ours not, says what it is called here."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise no_attribute("model", self, name) from None


class _WithImageTower(_Model):
    """What models with an `image_tower` share."""

    def encode_image(
        self, pixels: torch.Tensor | Patches, normalize: bool = True, project: bool = True
    ) -> torch.Tensor:
        """Embed images: (B, 3, H, W) float, preprocessed, to (B, E); unit length unless normalize=False.

        A model with `image.native` takes Patches too, as its bundle's preprocess makes them.
        With project=False the features are those before the projection, (B, D); towers without one have the
        same either way.
        """
        if not isinstance(pixels, Patches):
            _check_tensor(pixels, 4, "pixels (B, 3, H, W): bundle.preprocess(images) makes them")
        features = self.image_tower(pixels, project)
        return unit_length(features) if normalize else features


class _WithTextTower(_Model):
    """What models with a `text_tower` share."""

    def encode_text(self, tokens: torch.Tensor | PackedTokens, normalize: bool = True) -> torch.Tensor:
        """Embed texts: (B, context_length) int64 ids to (B, E); unit length unless normalize=False.

        What `text_tower.pack` makes of the ids gives the same embeddings, without computing padding.
        """
        if not isinstance(tokens, PackedTokens):
            _check_tensor(tokens, 2, "ids (B, N): bundle.tokenizer(texts) makes them")
        features = self.text_tower(tokens)
        return unit_length(features) if normalize else features


class DualEncoder(_WithImageTower, _WithTextTower):
    """Image and text towers with a shared embedding space (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023).

    `logit_scale` holds the logarithm of the factor on the similarities. `logit_bias` is None unless
    `config.init_logit_bias` is a number.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image, config.embed_dim)
        self.text_tower = TextTower(config.text, config.embed_dim)
        scale = 1 / 0.07 if config.init_logit_scale is None else config.init_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))
        for tower in (self.image_tower, self.text_tower):
            initialise_tower(tower, config.init)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor | PackedTokens) -> Features:
        """Embed a batch of pairs; see `Features`."""
        return Features(self.encode_image(pixels), self.encode_text(tokens), self.logit_scale.exp(), self.logit_bias)


class ImageModel(_WithImageTower):
    """An image tower, as vision-only checkpoints hold it: pixels (B, 3, H, W) to (B, E)."""

    def __init__(self, config: ImageModelConfig):
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image, config.embed_dim)
        initialise_tower(self.image_tower, "siglip")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `encode_image`, unit length."""
        return self.encode_image(pixels)


class TextModel(_WithTextTower):
    """A text tower, as text-only checkpoints hold it: ids (B, N) to (B, E)."""

    def __init__(self, config: TextModelConfig):
        super().__init__()
        self.config = config
        self.text_tower = TextTower(config.text, config.embed_dim)
        initialise_tower(self.text_tower, "siglip")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `encode_text`, unit length."""
        return self.encode_text(tokens)


class ImageClassifier(_WithImageTower):
    """An image tower and a linear head (Dosovitskiy et al. 2021): pixels (B, 3, H, W) to class scores (B, C).

    The head starts at zero, so that the first scores favour no class. `encode_image` gives the features below it.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if not config.num_classes:
            raise UserError("model.num_classes is not set: give the number of classes")
        width = config.image.width if config.embed_dim is None else config.embed_dim
        self.config = replace(config, embed_dim=width)
        self.image_tower = ImageTower(config.image, width)
        self.head = nn.Linear(width, config.num_classes)
        initialise_tower(self.image_tower, "siglip")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float, preprocessed, to class scores (B, C)."""
        features = self.encode_image(pixels, normalize=self.config.unit_features)
        # Cosines times 100 would be off by up to 0.2 in bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    forward = scores  # what a run wraps for its precision and its processes


def _check_tensor(given: torch.Tensor, dims: int, wanted: str) -> None:
    if not isinstance(given, torch.Tensor):
        raise UserError(f"a {type(given).__name__} is no tensor of {wanted}")
    if given.ndim == dims - 1:
        one = "image, pixels" if dims == 4 else "text, tokens"
        raise UserError(f"a tensor of shape {tuple(given.shape)} is none of {wanted}; of one {one}[None]")


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """L2-normalise rows in float32 at least: in bfloat16 their length would be off by up to 0.4 %."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
