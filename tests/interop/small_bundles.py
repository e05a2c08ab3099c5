"""Small models with all that belongs to them, of every architecture of ours; weights far from their start."""

from dataclasses import replace
from pathlib import Path

import torch

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.interop.bundle import Bundle
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
    TextTowerConfig,
)

SHAPE = {"width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 48}
CAPTIONS = ["a photo of a cat", "two dogs running on the beach", "a red circle and a blue star"] * 4
CLIP_LIKE = {"activation": "quick_gelu", "norm_eps": 1e-5}


def small_bundle(kind, image_size=32, patch_size=8, seed=0):
    """Return a Bundle: 'siglip', 'native' (images of any shape), 'clip', 'average', 'classifier', 'image' or 'text'."""
    torch.manual_seed(seed)
    tokenizer = train_bpe(CAPTIONS, vocab_size=300, context_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id")}
    image = ImageTowerConfig(image_size=image_size, patch_size=patch_size, **SHAPE)
    text = TextTowerConfig(context_length=12, **ids, **SHAPE)
    preprocess = PreprocessConfig(image_size=image_size)
    siglip = ModelConfig(embed_dim=32, image=image, text=text, init_logit_scale=10.0, init_logit_bias=-10.0)
    if kind == "clip":
        image = replace(image, pool="class", class_token=True, pre_norm=True, patch_bias=False, projection=True)
        text = replace(text, causal=True, pool="eos", projection_bias=False, **CLIP_LIKE)
        config = ModelConfig(embed_dim=24, image=replace(image, **CLIP_LIKE), text=text, init="clip")
        preprocess = PreprocessConfig(image_size=image_size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD)
    elif kind == "average":
        image = replace(image, pool="average", position="sincos", activation="gelu", projection=True)
        text = replace(text, pool="average", attend_padding=False, activation="gelu")
        config = replace(siglip, image=image, text=text)
    elif kind == "native":
        config = replace(siglip, image=replace(image, native=True))
        options = {"resize": "native", "interpolation": "bilinear", "patches": 20}
        preprocess = PreprocessConfig(image_size, patch_size, **options)
    elif kind == "classifier":
        config = ClassifierConfig(replace(image, pool="average", class_token=True), 32, num_classes=5)
    elif kind == "image":
        config = ImageModelConfig(32, image)
    elif kind == "text":
        config = TextModelConfig(32, text)
    else:
        config = siglip
    models = {"classifier": ImageClassifier, "image": ImageModel, "text": TextModel}
    model = models.get(kind, DualEncoder)(config).eval()
    with torch.no_grad():  # biases and norms too, which start at 0 and 1
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Bundle(
        model=model,
        preprocess=None if kind == "text" else Preprocess(preprocess),
        tokenizer=None if kind in ("classifier", "image") else tokenizer,
        config=config,
        path=Path("a-source"),
        class_names=tuple("abcde") if kind == "classifier" else None,
    )
