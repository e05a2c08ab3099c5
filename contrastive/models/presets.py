"""Named architectures, our names and those of open_clip, transformers and timm: what each says, and its sizes.

Ours are `clip_vit_b_16`, `siglip_vit_so400m_14`, ...; of classifiers `tiny`, `base`, ...
"""

import fnmatch
import os
import re
from dataclasses import fields, replace
from typing import NamedTuple

from contrastive.errors import UserError, did_you_mean
from contrastive.models.encoders import ClassifierConfig, DualEncoder, ModelConfig
from contrastive.models.image_tower import ImageTowerConfig
from contrastive.models.text_tower import TextTowerConfig
from contrastive.words import called_here

PATCH_SIZES = (4, 8, 14, 16, 32)
SPELLED_OUT = {"tiny": "ti", "small": "s", "medium": "m", "base": "b", "large": "l", "huge": "h", "giant": "g"}
SPELLED_OUT |= {"gigantic": "bigg", "giant-opt": "gopt", "giantopt": "gopt"}
# ViT-g is not ViT-G, which open_clip calls bigG: this letter alone is read as it is written.
_SIZE = rf"(?P<size>{'|'.join(SPELLED_OUT)}|so400m|gopt|bigg|ti|s|m|b|l|h|e|(?-i:g))"
_PATCH, _IMAGE = rf"(?P<patch>{'|'.join(map(str, PATCH_SIZES))})", r"(?P<image>\d{3})"
SPELLINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<own>clip|siglip)[_-]vit[_-]{_SIZE}[_-]{_PATCH}",
        rf"(?:timm/)?vit-{_SIZE}-{_PATCH}(?P<plus>-plus)?(?:-(?P<family>siglip2?))?(?P<i18n>-i18n)?(?:-{_IMAGE})?"
        r"(?P<quick>-quickgelu)?",
        rf"laion/clip-vit-{_SIZE}-{_PATCH}-(?:laion2b|datacomp|commonpool)\S*",
        rf"(?:google/)?(?P<family>siglip2?)-{_SIZE}-patch{_PATCH}-{_IMAGE}(?P<i18n>-i18n)?",
        rf"(?:openai/)?(?P<openai>clip)-vit-{_SIZE}-patch{_PATCH}(?:-{_IMAGE})?",
        rf"(?:timm/)?vit_{_SIZE}_patch{_PATCH}(?P<plus>_plus)?_(?P<family>siglip|clip)(?P<quick>_quickgelu)?_{_IMAGE}"
        r"(?:\.(?P<tag>\w+))?",
    )
)
PLAIN_VIT = re.compile(rf"(?:timm/|google/)?vit[_-]{_SIZE}[_-]patch{_PATCH}[_-]{_IMAGE}(?:[.-]\S*)?", re.IGNORECASE)
OWN_NAMES = tuple(
    f"{family}_vit_{size}_{patch}"
    for family in ("clip", "siglip")
    for size in ("ti", "s", "b", "l", "h", "so400m")
    for patch in PATCH_SIZES
)
_OTHERS = """
    ViT-B-32 ViT-B-16 ViT-L-14 ViT-L-14-336 ViT-H-14 ViT-g-14 ViT-bigG-14 ViT-B-16-quickgelu ViT-B-16-SigLIP
    ViT-B-16-SigLIP-256 ViT-L-16-SigLIP-256 ViT-SO400M-14-SigLIP-384 ViT-B-16-SigLIP2 ViT-gopt-16-SigLIP2-256
    openai/clip-vit-base-patch32 openai/clip-vit-large-patch14 google/siglip-base-patch16-224
    google/siglip-so400m-patch14-384 google/siglip2-base-patch16-224
    vit_base_patch16_clip_224 vit_base_patch16_siglip_224
"""
EXAMPLES = tuple(_OTHERS.split())  # of the others' names, to show and to suggest
# What other names stand for, by what is found in them first.
NOT_OURS = {
    "naflex": "it takes images of any shape, as google/siglip2-base-patch16-256 does with --model.image.native",
    "coca|mammut|genlip": "it has a text decoder",
    "roberta|mt5|nllb|xlm|bert|moderntext": "its text tower is another library's",
    r"^rn\d|resnet|convnext|swin|vitamin|mobileclip|^eva|pe-core|fastvit|efficientnet|dino|tips|regnet|relpos|deit|beit|"
    r"htsat|clap|clipa|clips|worldwide|-alt|_gap_": "it has other towers or another tokenizer",
}

# Of the image tower width, depth, num_heads and mlp_dim; of CLIP's text tower, whose heads have 64 channels, width and
# depth. ViT table 1; ti and s: DeiT; so400m: Alabdulmohsin 2023; gopt: SigLIP 2's largest; the others: open_clip.
SIZES = {
    "ti": ((192, 12, 3, 768), (256, 12)),
    "s": ((384, 12, 6, 1536), (384, 12)),
    "m": ((512, 12, 8, 2048), (512, 12)),
    "b": ((768, 12, 12, 3072), (512, 12)),
    "plus": ((896, 12, 14, 3584), (640, 12)),
    "l": ((1024, 24, 16, 4096), (768, 12)),
    "h": ((1280, 32, 16, 5120), (1024, 24)),
    "g": ((1408, 40, 16, 6144), (1024, 24)),
    "bigg": ((1664, 48, 16, 8192), (1280, 32)),
    "e": ((1792, 56, 16, 15360), (1280, 36)),
    "so400m": ((1152, 27, 16, 4304), None),  # both towers alike
    "gopt": ((1536, 40, 16, 6144), None),
}
SIZE_NAMES = {name: SPELLED_OUT[name] for name in ("tiny", "small", "base", "large", "huge")}
SIGLIP_VOCABULARY, SIGLIP_I18N_VOCABULARY, SIGLIP2_VOCABULARY = 32_000, 250_000, 256_000
# What all CLIPs have, whatever their size.
CLIP_IMAGE_TOWER = ImageTowerConfig(
    pool="class", class_token=True, pre_norm=True, patch_bias=False, projection=True, norm_eps=1e-5
)
CLIP_TEXT_TOWER = TextTowerConfig(
    vocab_size=49_408,
    context_length=77,
    causal=True,
    pool="eos",
    projection_bias=False,
    eos_id=49_407,
    pad_id=0,
    norm_eps=1e-5,
)


class Architecture(NamedTuple):
    """What a name says. Sizes are keys of `SIZES`."""

    family: str
    """clip, siglip or siglip2."""
    size: str
    patch_size: int
    image_size: int
    """In whole patches: of 384 pixels in patches of 14 the towers of all libraries see 378."""
    quick_gelu: bool
    """Of clip: OpenAI's activation; open_clip's and timm's names mean GELU unless they say quickgelu."""
    i18n: bool
    """Of siglip: the multilingual vocabulary."""
    named_elsewhere: bool
    """Whether the name is another library's, and means that library's model."""


def architecture(name: str) -> Architecture:
    """Read a name; UserError, which says what is meant as far as it can be told, for any other."""
    found = next(filter(None, (spelling.fullmatch(name) for spelling in SPELLINGS)), None)
    if found is None:
        raise UserError(_unknown(name))
    said = found.groupdict()
    family, tag = (said.get("own") or said.get("family") or "clip").lower(), said.get("tag") or ""
    patch_size, image_size = int(said["patch"]), int(said.get("image") or 224)
    if image_size % patch_size and (image_size, patch_size) != (384, 14):
        raise UserError(f"unknown model '{name}': {image_size} pixels are no whole number of patches of {patch_size}")
    return Architecture(
        family="siglip2" if tag.startswith("v2") else family,
        size="plus" if said.get("plus") else _size(said["size"]),
        patch_size=patch_size,
        image_size=image_size // patch_size * patch_size,
        quick_gelu=any(said.get(mark) for mark in ("own", "openai", "quick")),
        i18n=bool(said.get("i18n")) or tag.endswith("i18n"),
        named_elsewhere=not said.get("own"),
    )


def plain_vit(name: str) -> tuple[str, int, int] | None:
    """Return size, patch size and image size that timm's or transformers' name of a plain ViT says; None for others."""
    said = PLAIN_VIT.fullmatch(name)
    return None if said is None else (_size(said["size"]), int(said["patch"]), int(said["image"]))


def _size(spelled: str) -> str:
    return SPELLED_OUT.get(spelled.lower(), spelled.lower())


def _unknown(name: str) -> str:
    if plain_vit(name):
        return f"'{name}' is an image tower without a text tower: contrastive classifier --model {name} trains it"
    slashed = re.fullmatch(r"ViT-(\w+)/(\d+)(?:@(\d+)px)?", name, re.IGNORECASE)
    if slashed:
        meant = "-".join(filter(None, ("ViT", *slashed.groups())))
        return f"'{name}' can be two models: {meant} has GELU (open_clip's), {meant}-quickgelu OpenAI's activation"
    if name.startswith("ViT-G-"):
        return f"'{name}' is ViT-bigG{name[5:]} here, as in open_clip; ViT-g{name[5:]} is a smaller one"
    is_place = ":" in name or os.path.exists(name)
    for pattern, reason in NOT_OURS.items():
        if re.search(pattern, name, re.IGNORECASE) and not is_place:
            return f"'{name}' is not among our models, which are plain ViTs with a text tower, as ViT-B-16: {reason}"
    hint = did_you_mean(name, (*OWN_NAMES, *EXAMPLES))
    if is_place or "/" in name:
        place = f"hf-hub:{name}" if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not is_place else name
        return f"'{name}' is no architecture.{hint} Models with weights: contrastive.load('{place}'), --init {place}"
    return f"unknown model '{name}'.{hint} contrastive.list_models() and --model list show the names"


def list_models(pattern: str = "*") -> list[str]:
    """Return our names of architectures, those like `"*siglip*"`; `create_model` and `--model` take others' too."""
    return fnmatch.filter(OWN_NAMES, pattern)


def model_config(name: str) -> ModelConfig:
    """Return the options of a named architecture: ours, or one of open_clip, transformers or timm by its name there.

    Shapes are those of that library's model of the name; of timm's, an image tower, the text tower of the model that it
    comes from is taken too. SigLIP's activation is always the tanh form of GELU, as in big_vision and transformers.

    Raises UserError for a name that is none, and says which one may be meant.
    """
    said = architecture(name)
    config = _clip(said) if said.family == "clip" else _siglip(said)
    return replace(config, image=replace(config.image, image_size=said.image_size))


def create_model(name: str, pretrained: None = None, **overrides) -> DualEncoder:
    """Build a named architecture with random weights; `contrastive.load` reads models with theirs.

    Args:
        name: one of `list_models()`, or a name of open_clip, transformers or timm: 'ViT-B-16',
            'google/siglip-base-patch16-224', 'vit_base_patch16_siglip_224'.
        pretrained: open_clip's and timm's option; weights are never read here, so that anything but None is an error.
        overrides: fields of ModelConfig to replace, e.g. `embed_dim=256`.

    Raises:
        UserError: an unknown name or field, options that contradict each other.
    """
    config = model_config(name)
    if pretrained:
        overrides = {"pretrained": pretrained}
    known = [field.name for field in fields(ModelConfig)]
    for word in overrides:
        if word not in known:
            hint = called_here("create_model", word) or f".{did_you_mean(word, known)} It has {', '.join(known)}"
            raise UserError(f"create_model has no option '{word}'{hint}")
    if config.init == "siglip":
        config = replace(config, init_logit_scale=10.0, init_logit_bias=-10.0)
    return DualEncoder(replace(config, **overrides))


def model_table() -> str:
    """Return the names, ours and some of the others', with their sizes, a line each: what `--model list` prints."""
    rows = [("name", "parameters", "pixels", "tokens", "text length", "vocabulary")]
    for name in (*OWN_NAMES, *EXAMPLES):
        config = model_config(name)
        image, text = config.image, config.text
        count = f"{num_parameters(config) / 1e6:,.1f} M"
        tokens = image.num_patches + image.class_token
        rows.append((name, count, image.image_size, tokens, text.context_length, f"{text.vocab_size:,}"))
    return "\n".join(f"{name:34} {''.join(f'{cell:>13}' for cell in cells)}" for name, *cells in rows)


def num_parameters(config: ModelConfig) -> int:
    """Return how many numbers the model learns, without building it."""
    text, scalars = config.text, 1 + (config.init_logit_bias is not None)
    total = text.width * (text.vocab_size + text.context_length + 2) + text.depth * _block(text)
    total += text.projection * config.embed_dim * (text.width + text.projection_bias)
    return total + _image_parameters(config.image, config.embed_dim) + scalars


def _image_parameters(image: ImageTowerConfig, embed_dim: int) -> int:
    tokens = (image.num_patches + image.class_token) * (image.position == "learned")
    rows = 3 * image.patch_size**2 + image.patch_bias + image.class_token + tokens + 2 * image.pre_norm + 2
    head = (image.pool == "attention") * (_block(image) - image.width)  # a query more than a block, a LayerNorm less
    return image.width * (rows + image.projection * embed_dim) + head + image.depth * _block(image)


def _block(tower: ImageTowerConfig | TextTowerConfig) -> int:
    return tower.width * (4 * tower.width + 2 * tower.mlp_dim + 9) + tower.mlp_dim


def list_classifiers() -> list[str]:
    """Return the names that `classifier_config` takes."""
    return list(SIZE_NAMES)


def classifier_config(name: str) -> ClassifierConfig:
    """Return the options of 'tiny', 'small', 'base', 'large' or 'huge', or of timm's name of a plain ViT.

    Class token, learned positions, exact GELU. Patches of 16 pixels, of 14 for huge, as in the paper's tables.

    Raises UserError for another name.
    """
    said = plain_vit(name)
    size, patch_size, image_size = said or (SIZE_NAMES.get(name), 14 if name == "huge" else 16, 224)
    if size not in SIZE_NAMES.values():
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, SIZE_NAMES)} Known: {', '.join(SIZE_NAMES)}")
    sizes = {"image_size": image_size, "patch_size": patch_size} | _shape(size)
    return ClassifierConfig(image=ImageTowerConfig(pool="class", class_token=True, activation="gelu", **sizes))


def classifier_table() -> str:
    """Return the names that `classifier_config` takes with their sizes, a line each: what `--model list` prints."""
    rows = [f"{'name':20} {'parameters':>12} {'pixels':>8} {'patches':>8}"]
    for name in (*SIZE_NAMES, "vit_base_patch32_384"):
        image = classifier_config(name).image
        count = f"{_image_parameters(image, 0) / 1e6:,.1f} M"
        rows.append(f"{name:20} {count:>12} {image.image_size:8} {image.patch_size:8}")
    return "\n".join(rows)


def _shape(size: str) -> dict[str, int]:
    return dict(zip(("width", "depth", "num_heads", "mlp_dim"), SIZES[size][0], strict=True))


def _clip(said: Architecture) -> ModelConfig:
    if said.size == "gopt":
        raise UserError("no CLIP has a text tower for an image tower of size 'gopt'; SigLIP 2 has it")
    shape = _shape(said.size)
    if said.size != "so400m":
        width, depth = SIZES[said.size][1]
        shape = {"width": width, "depth": depth, "num_heads": width // 64, "mlp_dim": 4 * width}
    activation = "quick_gelu" if said.quick_gelu else "gelu"
    image, text = (replace(tower, activation=activation) for tower in (CLIP_IMAGE_TOWER, CLIP_TEXT_TOWER))
    return ModelConfig(
        embed_dim=shape["width"],
        image=replace(image, patch_size=said.patch_size, **_shape(said.size)),
        text=replace(text, **shape),
        init="clip",
    )


def _siglip(said: Architecture) -> ModelConfig:
    image, text = _shape(said.size), _shape("so400m" if said.size == "gopt" else said.size)
    vocab_size = SIGLIP2_VOCABULARY if said.family == "siglip2" else SIGLIP_VOCABULARY
    if said.i18n:
        vocab_size = SIGLIP_I18N_VOCABULARY
    # What Google's own checkpoints of this size have, and no other.
    so400m = said.size == "so400m" and said.family == "siglip" and said.named_elsewhere
    return ModelConfig(
        embed_dim=image["width"],
        image=ImageTowerConfig(patch_size=said.patch_size, **image),
        text=TextTowerConfig(
            vocab_size=vocab_size,
            context_length=16 if so400m and (said.patch_size, said.image_size) == (14, 224) else 64,
            projection=not (so400m and said.i18n),
            **text,
        ),
        init="siglip",
    )
