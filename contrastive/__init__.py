"""Pretrain CLIP and SigLIP models from scratch; evaluate them; use them as image encoders.

model = contrastive.create_model("siglip_vit_b_16")
bundle = contrastive.load("runs/quickstart-sigmoid")
encoder = contrastive.load_image_encoder("runs/quickstart-sigmoid", layer=-2)   # patch tokens for VLMs
"""

import importlib
from typing import Any

# Loaded when first asked for: `import contrastive` alone takes no time.
_HOMES = {
    "ImageEncoder": "contrastive.models.image_encoder",
    "create_model": "contrastive.models",
    "list_models": "contrastive.models",
    "load": "contrastive.interop.loading",
    "load_image_encoder": "contrastive.interop.encoder",
    "losses": None,
    "models": None,
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'contrastive' has no attribute '{name}'")
    if _HOMES[name] is None:
        return importlib.import_module(f"contrastive.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
