"""The names of architectures, ours and those of open_clip, transformers and timm: what each of them says."""

import os
import re
from typing import NamedTuple

from contrastive.errors import UserError, did_you_mean

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


class Architecture(NamedTuple):
    """What a name says. Sizes are keys of `presets.SIZES`."""

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
