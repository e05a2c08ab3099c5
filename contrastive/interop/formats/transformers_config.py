"""config.json of transformers' SigLIP, SigLIP 2 and CLIP models as our options.

Files hold what differs from the library's defaults, which are taken from its own classes.
"""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.formats.option_kinds import is_count, is_number
from contrastive.interop.formats.tokenizer_reading import end_of_text_id, highest_id
from contrastive.log import warn
from contrastive.models import ImageModelConfig, ImageTowerConfig, ModelConfig, TextModelConfig, TextTowerConfig

STEMS = {"siglip": "Siglip", "siglip2": "Siglip2", "clip": "CLIP"}
"""What the names of a family's classes begin with."""
PROJECTED = "WithProjection"
CLASSES = {
    **{f"{stem}Model": (family, "both") for family, stem in STEMS.items()},
    **{f"{stem}VisionModel": (family, "image") for family, stem in STEMS.items()},
    **{f"{stem}TextModel": (family, "text") for family, stem in STEMS.items()},
    f"CLIPVisionModel{PROJECTED}": ("clip", "image"),
    f"CLIPTextModel{PROJECTED}": ("clip", "text"),
}
MODEL_TYPES = {
    **{family: (family, "both") for family in STEMS},
    **{f"{family}_vision_model": (family, "image") for family in STEMS},
    **{f"{family}_text_model": (family, "text") for family in STEMS},
}
# Options by their names and ours.
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
BLOCKS = {
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}
VOCABULARY = {"vocab_size": "vocab_size", "max_position_embeddings": "context_length"}
COUNTS = (*BLOCKS, *VOCABULARY, "num_channels", "num_patches", "projection_dim", "projection_size")
READ = (*COUNTS, "image_size", "patch_size", "hidden_act", "layer_norm_eps", "vision_use_head", "eos_token_id")
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
    projection_dim: int | None
    """Of a whole CLIP model."""
    projected: bool | None
    """Of a CLIP tower alone: whether it ends in a projection; None where only the weights can tell."""

    def where(self, section: str) -> str:
        """What stands before the name of an option of 'vision' or 'text' in messages."""
        return f"{self.file}: " + (f"{section}_config." if self.part == "both" else "")


def library_defaults(family: str, section: str) -> dict:
    """Return what the library takes for the options that we read; `section`: 'Vision', 'Text', or '' for the whole."""
    import transformers

    # A signature, since making a default config of SigLIP's texts warns of its own ids.
    parameters = inspect.signature(getattr(transformers, f"{STEMS[family]}{section}Config")).parameters
    return {name: parameters[name].default for name in READ if name in parameters}


def read_description(folder: Path) -> Description:
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
    whole = part == "both" or model_type in STEMS
    sections = {}
    for section in ("vision", "text"):
        given = _section(content, f"{section}_config", file) or {} if whole else content
        old = _section(content, f"{section}_config_dict", file) if family == "clip" else None
        given = given if old is None else old  # the library lets it win whole, its own defaults included
        sections[section] = {**library_defaults(family, section.capitalize()), **given}
    projected = any(name.endswith(PROJECTED) for name in named) if named else None
    dim = content.get("projection_dim", library_defaults(family, "").get("projection_dim"))
    if part == "both" and family == "clip" and not is_count(dim):
        raise UserError(f"{file}: projection_dim is {dim!r}: it has to be a whole number above 0")
    found = Description(file, family, part, sections["vision"], sections["text"], dim, projected)
    if part != "text":
        _check_options(found.image, found.where("vision"), is_image=True)
    if part != "image":
        _check_options(found.text, found.where("text"), is_image=False)
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


def _check_options(options: dict, where: str, is_image: bool) -> None:
    """Raise UserError, naming the option behind `where`, where one is of a wrong type, which would fail much later."""
    for name in COUNTS:
        value = options.get(name)
        left_out = name not in options or (value is None and name == "projection_size")
        if not left_out and not is_count(value):
            raise UserError(f"{where}{name} is {value!r}: it has to be a whole number above 0")
    eps = options["layer_norm_eps"]
    if not is_number(eps) or eps < 0:
        raise UserError(f"{where}layer_norm_eps is {eps!r}: it has to be a number, 0 or more")
    if not isinstance(options["hidden_act"], str):
        raise UserError(f"{where}hidden_act is {options['hidden_act']!r}: it has to be the name of an activation")
    if is_image and not isinstance(options.get("vision_use_head", True), bool):
        raise UserError(f"{where}vision_use_head is {options['vision_use_head']!r}: it has to be true or false")
    if is_image and options.get("is_causal"):
        raise UserError(f"{where}is_causal is true: only images whose patches all attend to each other can be read")


def our_config(
    description: Description, mean_head: bool, eos_id: int | None
) -> ModelConfig | ImageModelConfig | TextModelConfig:
    """Return our options for a model of theirs.

    Args:
        mean_head: the attention head of the image tower is a plain mean (see `is_mean_head`).
        eos_id: what a CLIP text tower pools at.

    Raises:
        UserError: an option that our towers do not have.
    """
    if description.part == "image":
        image = _image_config(description, mean_head)
        return ImageModelConfig(description.image["projection_dim"] if image.projection else image.width, image)
    text = _text_config(description, eos_id)
    if description.part == "text":
        return TextModelConfig(_text_dim(description, text), text)
    image, embed_dim = _image_config(description, mean_head), _text_dim(description, text)
    if not image.projection and image.width != embed_dim:
        raise UserError(
            f"{description.file}: vision_config.hidden_size {image.width} and text_config.projection_size {embed_dim} "
            "differ, so that images and texts cannot be compared"
        )
    if description.family == "clip":
        return ModelConfig(embed_dim, image, text, "clip")
    return ModelConfig(embed_dim, image, text, "siglip", init_logit_bias=0.0)


def _text_dim(description: Description, text: TextTowerConfig) -> int:
    if description.family != "clip":
        return description.text["projection_size"] or text.width
    if not text.projection:
        return text.width
    return description.projection_dim if description.part == "both" else description.text["projection_dim"]


def native_size(description: Description) -> int:
    """Height and width in pixels of the images that the model takes."""
    if description.family != "siglip2":
        return image_side(description, "image_size")
    patches = description.image["num_patches"]
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(
            f"{description.where('vision')}num_patches {patches} is not a square: only a square grid of positions can "
            "be read"
        )
    return side * image_side(description, "patch_size")


def image_side(description: Description, name: str) -> int:
    """An option of the image tower that is a number of pixels, or two of them for a square."""
    value = description.image[name]
    sides = value if isinstance(value, list) and value else [value]
    if not is_count(sides[0]) or any(side != sides[0] for side in sides):
        raise UserError(
            f"{description.where('vision')}{name} is {value!r}: only squares can be read, of a whole number of pixels"
        )
    return sides[0]


def lacks_head(description: Description) -> bool:
    """Whether a SigLIP image tower ends with its patch tokens, as vision language models use it."""
    return description.family != "clip" and not description.image["vision_use_head"]


def _image_config(description: Description, mean_head: bool) -> ImageTowerConfig:
    """Our options of the image tower; images that patches do not fill count up to the last whole patch."""
    options, where = description.image, description.where("vision")
    if options["num_channels"] != 3:
        raise UserError(f"{where}num_channels is {options['num_channels']}: only models of RGB images can be read")
    if lacks_head(description) and description.part == "both":
        raise UserError(f"{where}vision_use_head is false: such a model has no image embedding to compare with texts")
    size, patch_size = native_size(description), image_side(description, "patch_size")
    shape = {**_blocks(options, where), "image_size": size - size % patch_size, "patch_size": patch_size}
    if description.family != "clip":
        return ImageTowerConfig(pool="average" if mean_head else "attention", **shape)
    projection = description.part == "both" or bool(description.projected)
    own = {"pool": "class", "class_token": True, "pre_norm": True, "patch_bias": False}
    return ImageTowerConfig(projection=projection, **own, **shape)


def _text_config(description: Description, eos_id: int | None) -> TextTowerConfig:
    options = description.text
    shape = {
        **_blocks(options, description.where("text")),
        **{ours: options[theirs] for theirs, ours in VOCABULARY.items()},
    }
    if description.family != "clip":
        return TextTowerConfig(**shape)
    projection = description.part == "both" or bool(description.projected)
    own = {"causal": True, "pool": "eos", "projection_bias": False}
    return TextTowerConfig(projection=projection, eos_id=eos_id, **own, **shape)


def _blocks(options: dict, where: str) -> dict:
    activation = options["hidden_act"]
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}hidden_act '{activation}' is not supported; known: {', '.join(ACTIVATIONS)}")
    numbers = {ours: options[theirs] for theirs, ours in BLOCKS.items()}
    return {**numbers, "activation": ACTIVATIONS[activation], "norm_eps": options["layer_norm_eps"]}


def pooled_id(description: Description) -> int | None:
    """The id at which the text tower pools, None where it is no id; where it is a guess that is said.

    Raises:
        UserError: it is not in the vocabulary, or there are several.
    """
    if description.family != "clip" or description.part == "image":
        return None
    eos, vocab_size = description.text["eos_token_id"], description.text["vocab_size"]
    if eos == LEGACY_EOS:
        return _highest_pooled_id(description.file, vocab_size - 1)
    if type(eos) is not int or not 0 <= eos < vocab_size:
        raise UserError(
            f"{description.where('text')}eos_token_id is {eos}, which is no id of a vocabulary of {vocab_size}: set "
            "it to the id of the tokenizer's end-of-text token"
        )
    return eos


def _highest_pooled_id(file: Path, last: int) -> int:
    """What a tower that pools at the highest id of each text pools at: the end of text, if that is the highest.

    Args:
        last: the last id of the vocabulary, which can be padded.
    """
    highest = highest_id(file.parent)
    eos_id = last if highest is None else min(highest, last)
    if not end_of_text_id(file.parent) == highest == eos_id:
        warn(
            f"{file}: eos_token_id {LEGACY_EOS} means the highest id of each text to the library; here it "
            f"is always {eos_id}, a guess, as no tokenizer here has its end-of-text token as its highest id: set "
            "eos_token_id to that token's id"
        )
    return eos_id
