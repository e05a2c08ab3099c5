"""Image and text towers, from scratch on torch."""

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
from contrastive.models.presets import classifier_config, create_model, list_classifiers, list_models, model_config
from contrastive.models.text_tower import TextTower, TextTowerConfig

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
    "TextModel",
    "TextModelConfig",
    "TextTower",
    "TextTowerConfig",
    "classifier_config",
    "create_model",
    "list_classifiers",
    "list_models",
    "model_config",
]
