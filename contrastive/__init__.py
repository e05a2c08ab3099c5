"""Pretrain CLIP and SigLIP models from scratch; evaluate them; use them as image encoders.

    model = contrastive.create_model("siglip_vit_b_16")           # random weights; "ViT-B-16" and others' names will do
    bundle = contrastive.load("runs/quickstart-sigmoid")          # .model, .preprocess, .tokenizer, .config
    encoder = contrastive.load_image_encoder("runs/quickstart-sigmoid", layer=-2)   # patch tokens for VLMs
    loss = contrastive.losses.SigmoidLoss()                       # of any features: loss(image, text, scale, bias)

A path is a run, a checkpoint, a model folder of ours, transformers, open_clip or timm, or hf-hub:ORGANISATION/NAME.
Training and evaluation are scripts: `contrastive pretrain --help`.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors, which do not run __getattr__
    from contrastive import losses as losses
    from contrastive import models as models
    from contrastive.interop.encoder import load_image_encoder as load_image_encoder
    from contrastive.interop.loading import load as load
    from contrastive.models import create_model as create_model
    from contrastive.models import list_models as list_models
    from contrastive.models.image_encoder import ImageEncoder as ImageEncoder

# OpenMP reads this as torch loads it. By default a thread that is done spins until the others are, and on a busy
# machine holds the very core that they need: a step takes four times as long. A thousand spins cost a quiet machine
# nothing, none at all cost it a sixth. What the user has set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.2.0"  # pyproject.toml takes it from here

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
        from contrastive.words import called_here

        here = called_here("contrastive", name)
        # Python would replace an AttributeError of `from contrastive import NAME` by words of its own.
        imported = here and sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise (ImportError if imported else AttributeError)(f"module 'contrastive' has no attribute '{name}'{here}")
    if _HOMES[name] is None:
        return importlib.import_module(f"contrastive.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
