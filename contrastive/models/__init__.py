"""Image and text towers, from scratch on torch."""

import importlib
from typing import Any

from contrastive.models.encoders import (
    ClassifierConfig,
    DualEncoder,
    Features,
    ImageClassifier,
    ImageModel,
    ImageModelConfig,
    ModelConfig,
    TextModel,
    TextModelConfig,
)
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.text_tower import PackedTokens, TextTower, TextTowerConfig

# Read when first asked for: a run without --model needs no names.
_PRESETS = (
    "classifier_config",
    "classifier_table",
    "create_model",
    "list_classifiers",
    "list_models",
    "model_config",
    "model_table",
)

__all__ = [
    *_PRESETS,
    "ClassifierConfig",
    "DualEncoder",
    "Features",
    "ImageClassifier",
    "ImageModel",
    "ImageModelConfig",
    "ImageTower",
    "ImageTowerConfig",
    "ModelConfig",
    "PackedTokens",
    "TextModel",
    "TextModelConfig",
    "TextTower",
    "TextTowerConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _PRESETS:
        raise AttributeError(f"module 'contrastive.models' has no attribute '{name}'")
    return getattr(importlib.import_module("contrastive.models.presets"), name)
