"""Image and text towers, from scratch on torch."""

from contrastive.models.classifier import ClassifierConfig, ImageClassifier, classifier_config, list_classifiers
from contrastive.models.dual_encoder import DualEncoder, Features, ModelConfig
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.presets import create_model, list_models, model_config
from contrastive.models.single_tower import ImageModel, ImageModelConfig, TextModel, TextModelConfig
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
