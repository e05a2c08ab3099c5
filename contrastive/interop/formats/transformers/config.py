"""config.json of transformers' SigLIP, SigLIP 2 and CLIP models as our options.

Files hold what differs from the library's defaults, so the defaults are here too; a test compares them with the
library's own classes.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.formats.transformers.options import check_options, is_count
from contrastive.models import (
    ImageModelConfig,
    ImageTowerConfig,
    ModelConfig,
    TextModelConfig,
    TextTowerConfig,
)

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SIGLIP = {**BASE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLIP = {**BASE, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
IMAGE_DEFAULTS = {
    "siglip": {**SIGLIP, "num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True},
    "siglip2": {**SIGLIP, "num_channels": 3, "num_patches": 256, "patch_size": 16, "vision_use_head": True},
    "clip": {**CLIP, "num_channels": 3, "image_size": 224, "patch_size": 32, "projection_dim": 512},
}
SIGLIP_TEXT = {**SIGLIP, "vocab_size": 32_000, "max_position_embeddings": 64, "projection_size": None}
CLIP_TEXT = {
    **CLIP,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
    "projection_dim": 512,
    "eos_token_id": 49_407,
}
TEXT_DEFAULTS = {"siglip": SIGLIP_TEXT, "siglip2": SIGLIP_TEXT, "clip": CLIP_TEXT}
PROJECTION_DIM = 512
"""Of a whole CLIPModel."""

WHOLE = {"siglip": "SiglipModel", "siglip2": "Siglip2Model", "clip": "CLIPModel"}
IMAGE = {"siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel", "clip": "CLIPVisionModel"}
TEXT = {"siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel", "clip": "CLIPTextModel"}
PROJECTED = "WithProjection"
CLASSES = {
    **{name: (family, "both") for family, name in WHOLE.items()},
    **{name: (family, "image") for family, name in IMAGE.items()},
    **{name: (family, "text") for family, name in TEXT.items()},
    IMAGE["clip"] + PROJECTED: ("clip", "image"),
    TEXT["clip"] + PROJECTED: ("clip", "text"),
}
MODEL_TYPES = {
    **{family: (family, "both") for family in WHOLE},
    **{f"{family}_vision_model": (family, "image") for family in WHOLE},
    **{f"{family}_text_model": (family, "text") for family in WHOLE},
}
LEGACY_EOS = 2
"""In a CLIP configuration this eos_token_id is an old mistake; the model then pools at the highest id of a text."""


@dataclass(frozen=True)
class Description:
    """What a config.json says about its model."""

    file: Path
    family: str
    """'siglip', 'siglip2' or 'clip'."""
    part: str
    """'both', 'image' or 'text': the towers that the folder holds."""
    image: dict
    """Options of the image tower with the library's defaults filled in; as for `text`, without meaning if absent."""
    text: dict
    projection_dim: int
    projected: bool | None
    """Of a CLIP tower alone: whether it ends in a projection; None where only the weights can tell."""


def describe(folder: Path) -> Description:
    """Read config.json.

    Raises:
        UserError: it is damaged, or its architecture is none that we know, or an option is of a wrong type.
    """
    file = folder / "config.json"
    content = read_json(file)
    named, model_type = content.get("architectures") or [], content.get("model_type")
    _check_head(content, named, model_type, file)
    known = [CLASSES[name] for name in named if name in CLASSES]
    if (named and not known) or (not named and model_type not in MODEL_TYPES):
        what = f"architecture {named[0]}" if named else f"model_type '{model_type}'"
        raise UserError(f"{file}: {what} is not supported; what can be read: {', '.join(CLASSES)}")
    family, part = known[0] if known else MODEL_TYPES[model_type]
    whole = part == "both" or model_type in WHOLE
    sections = {}
    for section, defaults in (("vision", IMAGE_DEFAULTS[family]), ("text", TEXT_DEFAULTS[family])):
        given = _section(content, f"{section}_config", file) or {} if whole else content
        old = _section(content, f"{section}_config_dict", file) if family == "clip" else None
        given = given if old is None else old  # the library lets it win whole, its own defaults included
        sections[section] = {**defaults, **given}
    projected = any(name.endswith(PROJECTED) for name in named) if named else None
    dim = content.get("projection_dim", PROJECTION_DIM)
    if part == "both" and family == "clip" and not is_count(dim):
        raise UserError(f"{file}: projection_dim is {dim!r}: it has to be a whole number above 0")
    found = Description(file, family, part, sections["vision"], sections["text"], dim, projected)
    if part != "text":
        check_options(found.image, _where(found, "vision"), is_image=True)
    if part != "image":
        check_options(found.text, _where(found, "text"), is_image=False)
    return found


def _check_head(content: dict, named: object, model_type: object, file: Path) -> None:
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{file}: architectures is {named!r}: it has to be a list of names of classes")
    if not isinstance(model_type, str | None):
        raise UserError(f"{file}: model_type is {model_type!r}: it has to be a name")
    if content.get("quantization_config") is not None:
        raise UserError(
            f"{file} has a quantization_config: such weights mean nothing without the library that made them; take the "
            "model as it was before"
        )


def _section(content: dict, name: str, file: Path) -> dict | None:
    section = content.get(name)
    if not isinstance(section, dict | None):
        raise UserError(f"{file}: {name} is {section!r}: it has to be an object of options")
    return section


def our_config(
    description: Description, mean_head: bool, eos_id: int | None
) -> ModelConfig | ImageModelConfig | TextModelConfig:
    """Return our options for a model of theirs.

    Args:
        mean_head: the attention head of the image tower is a plain mean (see `equivalents`).
        eos_id: what a CLIP text tower pools at.

    Raises:
        UserError: an option that our towers do not have.
    """
    part = description.part
    if part == "image":
        image = image_config(description, mean_head)
        return ImageModelConfig(_image_dim(description, image), image)
    if part == "text":
        text = text_config(description, eos_id)
        return TextModelConfig(_text_dim(description, text), text)
    image, text = image_config(description, mean_head), text_config(description, eos_id)
    embed_dim = _text_dim(description, text)
    if not image.projection and image.width != embed_dim:
        raise UserError(
            f"{description.file}: vision_config.hidden_size {image.width} and text_config.projection_size {embed_dim} "
            "differ, so that images and texts cannot be compared"
        )
    if description.family == "clip":
        return ModelConfig(embed_dim, image, text, "clip")
    return ModelConfig(embed_dim, image, text, "siglip", init_logit_bias=0.0)


def native_size(description: Description) -> int:
    """Height and width in pixels of the images that the model takes."""
    options, where = description.image, _where(description, "vision")
    if description.family != "siglip2":
        return image_side(description, "image_size")
    side = math.isqrt(options["num_patches"])
    if side * side != options["num_patches"]:
        raise UserError(
            f"{where}num_patches {options['num_patches']} is not a square: only a square grid of positions can be read"
        )
    return side * image_side(description, "patch_size")


def image_side(description: Description, name: str) -> int:
    """An option of the image tower that is a number of pixels, or two of them for a square."""
    value = description.image[name]
    sides = value if isinstance(value, list) and value else [value]
    if not is_count(sides[0]) or any(side != sides[0] for side in sides):
        raise UserError(
            f"{_where(description, 'vision')}{name} is {value!r}: only squares can be read, of a whole number of pixels"
        )
    return sides[0]


def lacks_head(description: Description) -> bool:
    """Whether a SigLIP image tower ends with its patch tokens, as vision language models use it."""
    return description.family != "clip" and not description.image["vision_use_head"]


def image_config(description: Description, mean_head: bool) -> ImageTowerConfig:
    """Our options of the image tower; images that patches do not fill count up to the last whole patch."""
    options, where = description.image, _where(description, "vision")
    if options["num_channels"] != 3:
        raise UserError(f"{where}num_channels is {options['num_channels']}: only models of RGB images can be read")
    if lacks_head(description) and description.part == "both":
        raise UserError(f"{where}vision_use_head is false: such a model has no image embedding to compare with texts")
    size, patch_size = native_size(description), image_side(description, "patch_size")
    shape = {**_shape(options, where), "image_size": size - size % patch_size, "patch_size": patch_size}
    if description.family != "clip":
        return ImageTowerConfig(pool="average" if mean_head else "attention", **shape)
    projection = description.part == "both" or bool(description.projected)
    own = {"pool": "class", "class_token": True, "pre_norm": True, "patch_bias": False}
    return ImageTowerConfig(projection=projection, **own, **shape)


def text_config(description: Description, eos_id: int | None) -> TextTowerConfig:
    options, where = description.text, _where(description, "text")
    shape = {
        **_shape(options, where),
        "vocab_size": options["vocab_size"],
        "context_length": options["max_position_embeddings"],
    }
    if description.family != "clip":
        return TextTowerConfig(**shape)
    projection = description.part == "both" or bool(description.projected)
    own = {"causal": True, "pool": "eos", "projection_bias": False}
    return TextTowerConfig(projection=projection, eos_id=eos_id, **own, **shape)


def pooled_id(description: Description, highest: int | None) -> int | None:
    """The id at which the text tower pools; None where it is no id.

    Args:
        highest: the highest id that the folder's tokenizer gives; None where that is not known.

    Raises:
        UserError: it is not in the vocabulary, or there are several.
    """
    if description.family != "clip" or description.part == "image":
        return None
    eos, vocab_size = description.text["eos_token_id"], description.text["vocab_size"]
    if eos == LEGACY_EOS:
        return vocab_size - 1 if highest is None else min(highest, vocab_size - 1)
    if not isinstance(eos, int) or isinstance(eos, bool) or not 0 <= eos < vocab_size:
        raise UserError(
            f"{_where(description, 'text')}eos_token_id is {eos}, which is no id of a vocabulary of {vocab_size}: set "
            "it to the id of the tokenizer's end-of-text token"
        )
    return eos


def _where(description: Description, section: str) -> str:
    return f"{description.file}: " + (f"{section}_config." if description.part == "both" else "")


def _shape(options: dict, where: str) -> dict:
    activation = options["hidden_act"]
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}hidden_act '{activation}' is not supported; known: {', '.join(ACTIVATIONS)}")
    return {
        "width": options["hidden_size"],
        "depth": options["num_hidden_layers"],
        "num_heads": options["num_attention_heads"],
        "mlp_dim": options["intermediate_size"],
        "activation": ACTIVATIONS[activation],
        "norm_eps": options["layer_norm_eps"],
    }


def _image_dim(description: Description, image: ImageTowerConfig) -> int:
    return description.image["projection_dim"] if image.projection else image.width


def _text_dim(description: Description, text: TextTowerConfig) -> int:
    if description.family != "clip":
        return description.text["projection_size"] or text.width
    if not text.projection:
        return text.width
    return description.projection_dim if description.part == "both" else description.text["projection_dim"]
