"""Named architectures: `clip_vit_b_16`, `siglip_vit_so400m_14`, ...; and classifiers: `tiny`, `base`, ..."""

from dataclasses import replace

from contrastive.errors import UserError, did_you_mean
from contrastive.models.encoders import ClassifierConfig, DualEncoder, ModelConfig
from contrastive.models.image_tower import ImageTowerConfig
from contrastive.models.text_tower import TextTowerConfig

# width, depth, num_heads, mlp_dim of the image tower: ViT table 1; tiny and small: DeiT; so400m: Alabdulmohsin 2023
SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
}
SIZE_NAMES = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h"}
PATCH_SIZES = (4, 8, 14, 16, 32)
# embed_dim, then width, depth, num_heads of CLIP's text tower: OpenAI for b and l, open_clip for s and h
CLIP_TEXT = {
    "ti": (256, 256, 12, 4),
    "s": (384, 384, 12, 6),
    "b": (512, 512, 12, 8),
    "l": (768, 768, 12, 12),
    "h": (1024, 1024, 24, 16),
    "so400m": (1152, 1152, 27, 16),
}
# What all of OpenAI's models have, whatever their size.
CLIP_BLOCKS = {"activation": "quick_gelu", "norm_eps": 1e-5}
CLIP_IMAGE_TOWER = ImageTowerConfig(
    pool="class", class_token=True, pre_norm=True, patch_bias=False, projection=True, **CLIP_BLOCKS
)
CLIP_TEXT_TOWER = TextTowerConfig(
    vocab_size=49_408,
    context_length=77,
    causal=True,
    pool="eos",
    projection_bias=False,
    eos_id=49_407,
    pad_id=0,
    **CLIP_BLOCKS,
)


def list_models() -> list[str]:
    """Return the names that `create_model` and `--model` take."""
    return [f"{family}_vit_{size}_{patch}" for family in ("clip", "siglip") for size in SIZES for patch in PATCH_SIZES]


def model_config(name: str) -> ModelConfig:
    """Return the options of a named architecture. Sizes may be spelled out: `clip_vit_base_16`.

    Raises UserError for an unknown name.
    """
    parts = name.lower().replace("-", "_").split("_")
    if len(parts) == 4:
        parts[2] = SIZE_NAMES.get(parts[2], parts[2])
    canonical = "_".join(parts)
    if canonical not in list_models():
        raise UserError(
            f"unknown model '{name}'.{did_you_mean(canonical, list_models())} "
            f"Names are (clip|siglip)_vit_({'|'.join(SIZES)})_({'|'.join(map(str, PATCH_SIZES))})"
        )
    family, _, size, patch = parts
    return (_clip if family == "clip" else _siglip)(size, int(patch))


def create_model(name: str, **overrides) -> DualEncoder:
    """Build a named architecture with random weights.

    Args:
        name: one of `list_models()`.
        overrides: fields of ModelConfig to replace, e.g. `embed_dim=256`.
    """
    config = replace(model_config(name), **overrides)
    if config.init_logit_scale is None and name.lower().startswith("siglip"):
        config = replace(config, init_logit_scale=10.0, init_logit_bias=-10.0)
    return DualEncoder(config)


def list_classifiers() -> list[str]:
    """Return the names that `classifier_config` takes."""
    return list(SIZE_NAMES)


def classifier_config(name: str) -> ClassifierConfig:
    """Return the options of 'tiny', 'small', 'base', 'large' or 'huge'; UserError for another name.

    Class token, learned positions, exact GELU. Patches of 16 pixels, of 14 for huge, as in the paper's tables.
    """
    if name not in SIZE_NAMES:
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, SIZE_NAMES)} Known: {', '.join(SIZE_NAMES)}")
    shape = _shape(SIZE_NAMES[name])
    patch_size = 14 if name == "huge" else 16
    image = ImageTowerConfig(patch_size=patch_size, pool="class", class_token=True, activation="gelu", **shape)
    return ClassifierConfig(image=image)


def _shape(size: str) -> dict[str, int]:
    return dict(zip(("width", "depth", "num_heads", "mlp_dim"), SIZES[size], strict=True))


def _clip(size: str, patch_size: int) -> ModelConfig:
    embed_dim, width, depth, num_heads = CLIP_TEXT[size]
    mlp_dim = 4304 if size == "so400m" else 4 * width
    return ModelConfig(
        embed_dim=embed_dim,
        image=replace(CLIP_IMAGE_TOWER, patch_size=patch_size, **_shape(size)),
        text=replace(CLIP_TEXT_TOWER, width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim),
        init="clip",
    )


def _siglip(size: str, patch_size: int) -> ModelConfig:
    shape = _shape(size)
    return ModelConfig(
        embed_dim=shape["width"],
        image=ImageTowerConfig(patch_size=patch_size, **shape),
        text=TextTowerConfig(vocab_size=32_000, **shape),
        init="siglip",
    )
