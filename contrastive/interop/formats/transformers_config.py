"""config.json of transformers' SigLIP, SigLIP 2 and CLIP models as our options.

Files hold what differs from the library's defaults, which are taken from its own classes.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from contrastive.errors import UserError, needs
from contrastive.files import read_json
from contrastive.interop.formats import check, is_count, is_number
from contrastive.interop.formats.tokenizer_files import highest_id
from contrastive.log import warn
from contrastive.models import ImageModelConfig, ImageTowerConfig, ModelConfig, TextModelConfig, TextTowerConfig

Towers = Mapping[str, ImageTowerConfig | TextTowerConfig]
"""Options by 'image' and 'text', of the towers that there are."""

STEMS = {"siglip": "Siglip", "siglip2": "Siglip2", "clip": "CLIP"}
"""What the names of a family's classes begin with."""
SECTIONS = {"image": "vision", "text": "text"}
"""What they call a tower."""
ENDINGS = {"Model": ("image", "text"), "VisionModel": ("image",), "TextModel": ("text",)}
"""What the name of a class ends in, by the towers that it has."""
PROJECTED = "WithProjection"
CLASSES = {f"{stem}{ending}": (family, has) for ending, has in ENDINGS.items() for family, stem in STEMS.items()}
CLASSES |= {f"CLIP{ending}{PROJECTED}": ("clip", has) for ending, has in ENDINGS.items() if len(has) == 1}
MODEL_TYPES = {family: (family, ("image", "text")) for family in STEMS}
MODEL_TYPES |= {f"{family}_{SECTIONS[has]}_model": (family, (has,)) for family in STEMS for has in SECTIONS}

# Options by their names and ours.
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
BLOCKS = {
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "norm_eps",
}
VOCABULARY = {"vocab_size": "vocab_size", "max_position_embeddings": "context_length"}
# What options of theirs have to be.
COUNTS = (*BLOCKS, *VOCABULARY, "num_channels", "num_patches", "projection_dim", "projection_size")
KINDS = {
    **dict.fromkeys(COUNTS, (is_count, "a whole number above 0")),
    "layer_norm_eps": (lambda value: is_number(value) and value >= 0, "a number, 0 or more"),
    "hidden_act": (lambda value: isinstance(value, str), "the name of an activation"),
    "vision_use_head": (lambda value: isinstance(value, bool), "true or false"),
}
# Which values of our options a family has: reading takes the first, writing refuses others. The rest fits either.
FITTING = {
    "siglip": {
        "image": {
            "pool": ("attention", "average"),
            "class_token": (False,),
            "pre_norm": (False,),
            "projection": (False,),
            "native": (False,),
        },
        "text": {"pool": ("last",), "causal": (False,)},
    },
    "clip": {
        "image": {"pool": ("class",), "class_token": (True,), "pre_norm": (True,), "native": (False,)},
        "text": {"pool": ("eos",), "causal": (True,), "projection_bias": (False,)},
    },
}
FITTING["siglip2"] = {**FITTING["siglip"], "image": FITTING["siglip"]["image"] | {"native": (True,)}}
LEGACY_EOS = 2
"""In a CLIP configuration this eos_token_id is an old mistake; the model then pools at the highest id of a text."""


@dataclass(frozen=True)
class Description:
    """What a config.json says about its model."""

    file: Path
    family: str
    """'siglip', 'siglip2' or 'clip'."""
    towers: dict[str, dict]
    """Their options, with the library's defaults filled in, of 'image' and 'text', as far as the folder holds them."""
    projection_dim: int | None
    """Of a whole CLIP model."""
    projected: bool | None
    """Whether towers end in a projection; None where only the weights can tell, of a CLIP tower alone."""

    @property
    def whole(self) -> bool:
        """Whether it has both towers."""
        return len(self.towers) == 2

    def where(self, tower: str) -> str:
        """What stands before the name of an option of 'image' or 'text' in messages."""
        return f"{self.file}: " + (f"{SECTIONS[tower]}_config." if self.whole else "")

    @property
    def lacks_head(self) -> bool:
        """Whether a SigLIP image tower ends with its patch tokens, as vision language models use it."""
        # Newer versions of transformers name the option among their defaults, older ones take a head for given.
        return self.family != "clip" and not self.towers["image"].get("vision_use_head", True)

    @property
    def native_size(self) -> int:
        """Height and width in pixels of the images that the model takes; UserError where they are no squares."""
        if self.family != "siglip2":
            return self._side("image_size")
        patches = self.towers["image"]["num_patches"]
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(
                f"{self.where('image')}num_patches {patches} is not a square: only a square grid of positions can "
                "be read"
            )
        return side * self.patch_size

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels; UserError where it is no square."""
        return self._side("patch_size")

    def _side(self, name: str) -> int:
        """An option of the image tower that is a number of pixels, or two of them for a square."""
        value = self.towers["image"][name]
        sides = value if isinstance(value, list) and value else [value]
        if not is_count(sides[0]) or any(side != sides[0] for side in sides):
            raise UserError(
                f"{self.where('image')}{name} is {value!r}: only squares can be read, of a whole number of pixels"
            )
        return sides[0]


def library_defaults(family: str, section: str) -> dict:
    """Return what the library takes for options that are not given; `section`: 'Vision', 'Text', '' for the whole."""
    needs("a model of transformers", "transformers")
    import transformers

    # A signature, since making a default config of SigLIP's texts warns of its own ids. What is not by keyword alone
    # is of every model.
    options = inspect.signature(getattr(transformers, f"{STEMS[family]}{section}Config")).parameters.values()
    return {option.name: option.default for option in options if option.kind is option.KEYWORD_ONLY}


def read_description(folder: Path) -> Description:
    """Read config.json.

    Raises:
        UserError: it is damaged, or its architecture is none that we know, or an option is of a wrong type.
    """
    file = folder / "config.json"
    content = read_json(file)
    named, model_type = content.get("architectures") or [], content.get("model_type")
    names = isinstance(named, list) and all(isinstance(name, str) for name in named)
    check(names, f"{file}: architectures", named, "a list of names of classes")
    check(isinstance(model_type, str | None), f"{file}: model_type", model_type, "a name")
    if content.get("quantization_config") is not None:
        raise UserError(
            f"{file} has a quantization_config: such weights mean nothing without the library that made them; take the "
            "model as it was before"
        )
    known = [CLASSES[name] for name in named if name in CLASSES]
    if (named and not known) or (not named and model_type not in MODEL_TYPES):
        what = f"architecture {named[0]}" if named else f"model_type '{model_type}'"
        raise UserError(f"{file}: {what} is not supported; what can be read: {', '.join(CLASSES)}")
    family, has = known[0] if known else MODEL_TYPES[model_type]
    nested = len(has) == 2 or model_type in STEMS
    towers = {tower: _options(content, family, SECTIONS[tower], nested, file) for tower in has}
    projected = len(has) == 2 or (any(name.endswith(PROJECTED) for name in named) if named else None)
    dim = content.get("projection_dim", library_defaults(family, "").get("projection_dim"))
    if len(has) == 2 and family == "clip":
        check(is_count(dim), f"{file}: projection_dim", dim, "a whole number above 0")
    found = Description(file, family, towers, dim, projected)
    for tower, options in towers.items():
        _check_options(options, found.where(tower), tower)
    return found


def _options(content: dict, family: str, section: str, nested: bool, file: Path) -> dict:
    """The options of 'vision' or 'text', whose own object is `nested` or the whole content."""
    given = content
    # The library lets a section called _dict win whole, its own defaults included.
    names = [f"{section}_config"] * nested + [f"{section}_config_dict"] * (family == "clip")
    for name in names:
        if content.get(name) is not None:
            check(isinstance(content[name], dict), f"{file}: {name}", content[name], "an object of options")
            given = content[name]
        elif name == f"{section}_config":
            given = {}
    return {**library_defaults(family, section.capitalize()), **given}


def _check_options(options: dict, where: str, tower: str) -> None:
    """Raise UserError, naming the option behind `where`, where one is of a wrong type, which would fail much later."""
    for name, (fits, wanted) in KINDS.items():
        if name in options and not (name == "projection_size" and options[name] is None):  # as wide as the tower
            check(fits(options[name]), f"{where}{name}", options[name], wanted)
    if tower == "image" and options.get("is_causal"):
        raise UserError(f"{where}is_causal is true: only images whose patches all attend to each other can be read")


def our_config(found: Description, mean_head: bool) -> ModelConfig | ImageModelConfig | TextModelConfig:
    """Return our options for a model of theirs; UserError for one that our towers do not have.

    mean_head: the attention head of the image tower is a plain mean (see `is_mean_head`).
    """
    image, text = (_tower_config(found, tower) if tower in found.towers else None for tower in SECTIONS)
    if mean_head:
        image = replace(image, pool="average")
    if text is None:
        return ImageModelConfig(_embed_dim(found, "image", image), image)
    embed_dim = _embed_dim(found, "text", text)
    if image is None:
        return TextModelConfig(embed_dim, text)
    if not image.projection and image.width != embed_dim:
        raise UserError(
            f"{found.file}: vision_config.hidden_size {image.width} and text_config.projection_size {embed_dim} "
            "differ, so that images and texts cannot be compared"
        )
    if found.family == "clip":
        return ModelConfig(embed_dim, image, text, "clip")
    return ModelConfig(embed_dim, image, text, "siglip", init_logit_bias=0.0)


def _embed_dim(found: Description, tower: str, config: ImageTowerConfig | TextTowerConfig) -> int:
    options = found.towers[tower]
    if not config.projection:
        return config.width
    if found.family != "clip":
        return options["projection_size"] or config.width
    return found.projection_dim if found.whole else options["projection_dim"]


def _tower_config(found: Description, tower: str) -> ImageTowerConfig | TextTowerConfig:
    """Our options of a tower; images that patches do not fill count up to the last whole patch."""
    options, where, is_clip = found.towers[tower], found.where(tower), found.family == "clip"
    if tower == "image" and options["num_channels"] != 3:
        raise UserError(f"{where}num_channels is {options['num_channels']}: only models of RGB images can be read")
    if tower == "image" and found.lacks_head and found.whole:
        raise UserError(f"{where}vision_use_head is false: such a model has no image embedding to compare with texts")
    activation = options["hidden_act"]
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}hidden_act '{activation}' is not supported; known: {', '.join(ACTIVATIONS)}")
    ours = {ours: options[theirs] for theirs, ours in BLOCKS.items()} | {"activation": ACTIVATIONS[activation]}
    ours |= {option: values[0] for option, values in FITTING[found.family][tower].items()}
    ours |= {"projection": bool(found.projected)} if is_clip else {}
    if tower == "image":
        whole_patches = found.native_size - found.native_size % found.patch_size
        sizes = {"image_size": whole_patches, "patch_size": found.patch_size}
        return ImageTowerConfig(**sizes, patch_bias=not is_clip, **ours)
    words = {ours: options[theirs] for theirs, ours in VOCABULARY.items()}
    return TextTowerConfig(**words, eos_id=_pooled_id(found), **ours)


def _pooled_id(found: Description) -> int | None:
    """The id at which the text tower pools, None where it is no id; where it is a guess that is said.

    Raises:
        UserError: it is not in the vocabulary, or there are several.
    """
    if found.family != "clip":
        return None
    eos, vocab_size = found.towers["text"]["eos_token_id"], found.towers["text"]["vocab_size"]
    if eos == LEGACY_EOS:
        # The highest id of each text is that of its end, if no other token of the tokenizer has a higher one.
        highest, is_end = highest_id(found.file.parent)
        eos = vocab_size - 1 if highest is None else min(highest, vocab_size - 1)  # a vocabulary can be padded
        if not (is_end and highest == eos):
            warn(
                f"{found.file}: eos_token_id {LEGACY_EOS} means the highest id of each text to the library; here it "
                f"is always {eos}, a guess, as no tokenizer here has its end-of-text token as its highest id: set "
                "eos_token_id to that token's id"
            )
        return eos
    if type(eos) is not int or not 0 <= eos < vocab_size:
        raise UserError(
            f"{found.where('text')}eos_token_id is {eos}, which is no id of a vocabulary of {vocab_size}: set "
            "it to the id of the tokenizer's end-of-text token"
        )
    return eos
