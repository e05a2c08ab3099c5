"""Image and text towers, from scratch on torch."""

from contrastive.models.dual_encoder import DualEncoder, Features, ModelConfig
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.presets import create_model, list_models, model_config
from contrastive.models.text_tower import TextTower, TextTowerConfig

__all__ = [
    "DualEncoder",
    "Features",
    "ImageTower",
    "ImageTowerConfig",
    "ModelConfig",
    "TextTower",
    "TextTowerConfig",
    "create_model",
    "list_models",
    "model_config",
]
