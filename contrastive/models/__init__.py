"""Image and text towers, from scratch on torch."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # for editors, which do not run __getattr__
    from contrastive.models.presets import classifier_config as classifier_config
    from contrastive.models.presets import classifier_table as classifier_table
    from contrastive.models.presets import create_model as create_model
    from contrastive.models.presets import list_classifiers as list_classifiers
    from contrastive.models.presets import list_models as list_models
    from contrastive.models.presets import model_config as model_config
    from contrastive.models.presets import model_table as model_table

__all__ = [
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
    "classifier_config",
    "classifier_table",
    "create_model",
    "list_classifiers",
    "list_models",
    "model_config",
    "model_table",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'contrastive.models' has no attribute '{name}'")
    # Read when first asked for: a run without --model needs no names.
    return getattr(importlib.import_module("contrastive.models.presets"), name)
