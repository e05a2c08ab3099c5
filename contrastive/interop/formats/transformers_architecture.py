"""Our options as a config.json of transformers, and what there is no such file for."""

from collections.abc import Iterable
from dataclasses import dataclass

from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.interop.formats.transformers_config import (
    ACTIVATIONS,
    BLOCKS,
    LEGACY_EOS,
    PROJECTED,
    STEMS,
    VOCABULARY,
)
from contrastive.models import DualEncoder, ImageClassifier, ImageModel, ImageTowerConfig, TextModel, TextTowerConfig

# What each family has, by option. The rest of our options fit either.
IMAGE_NEEDS = {
    "siglip": {
        "pool": ("attention", "average"),
        "class_token": (False,),
        "pre_norm": (False,),
        "projection": (False,),
    },
    "clip": {"pool": ("class",), "class_token": (True,), "pre_norm": (True,)},
}
TEXT_NEEDS = {
    "siglip": {"pool": ("last",), "causal": (False,)},
    "clip": {"pool": ("eos",), "causal": (True,), "projection_bias": (False,)},
}


@dataclass(frozen=True)
class Parts:
    """What is to be written."""

    image: ImageTowerConfig | None
    text: TextTowerConfig | None
    embed_dim: int
    grid: tuple[int, int] | None
    """Rows and columns of the image tower's positions."""
    logit_bias: float | None

    @classmethod
    def of(cls, model: DualEncoder | ImageClassifier | ImageModel | TextModel) -> "Parts":
        """The towers of a model; a classifier's head is none of them."""
        tower, text = getattr(model, "image_tower", None), getattr(model, "text_tower", None)
        bias = getattr(model, "logit_bias", None)
        return cls(
            image=None if tower is None else tower.config,
            text=None if text is None else text.config,
            embed_dim=model.config.embed_dim,
            grid=None if tower is None else tower.grid,
            logit_bias=None if bias is None else bias.item(),
        )

    @property
    def part(self) -> str:
        if self.image is None or self.text is None:
            return "image" if self.text is None else "text"
        return "both"


def fitting_family(parts: Parts, name: str) -> str:
    """Return 'siglip' or 'clip', whichever can hold the model exactly.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: neither can; all that does not fit the nearer one is named.
    """
    found = {family: [*_problems(parts, family)] for family in ("siglip", "clip")}
    family = min(found, key=lambda name: len(found[name]))
    if not found[family]:
        return family
    wrong = "; ".join(text for text, _ in found[family])
    flags = " ".join(flag for _, flag in found[family] if flag)
    retrain = f"train it with {flags}, or " if flags else ""
    raise UserError(f"{name} cannot be written as {class_name(parts, family)}: {wrong}; {retrain}export it --to onnx")


def _problems(parts: Parts, family: str) -> Iterable[tuple[str, str | None]]:
    """What does not fit, and the flag of a run that would."""
    their_name = class_name(parts, family)
    for section, config, needs in (
        ("image", parts.image, IMAGE_NEEDS[family]),
        ("text", parts.text, TEXT_NEEDS[family]),
    ):
        for option, possible in needs.items() if config is not None else ():
            value = getattr(config, option)
            if option == "projection_bias" and not config.projection:
                continue
            if value not in possible:
                flag = f"--model.{section}.{option} {possible[0]}"
                if isinstance(possible[0], bool):
                    flag = f"--model.{section}.{'' if possible[0] else 'no_'}{option}"
                has = " or ".join(str(each).lower() for each in possible)
                yield f"model.{section}.{option} is {str(value).lower()}, {their_name} has {has}", flag
    if parts.grid is not None and parts.grid[0] != parts.grid[1]:
        rows, columns = parts.grid
        yield f"its positions are a grid of {rows}×{columns}, {their_name} has squares (set_input_size(SIDE))", None
    if family == "clip" and parts.logit_bias:
        yield f"logit_bias is {parts.logit_bias:.4g}, {their_name} has none", "--loss softmax"
    if family == "clip" and parts.text is not None and parts.text.eos_id == LEGACY_EOS:
        yield (
            f"its end-of-text token is id {LEGACY_EOS}, by which {their_name} means the highest id of a text (train "
            "its tokenizer anew: eos is id 1 now)",
            None,
        )


def class_name(parts: Parts, family: str) -> str:
    """The class of transformers that holds the model."""
    stem = STEMS[family]
    if parts.part == "both":
        return f"{stem}Model"
    projected = family == "clip" and (parts.image or parts.text).projection
    return f"{stem}{'Text' if parts.image is None else 'Vision'}Model{PROJECTED if projected else ''}"


def their_config(parts: Parts, family: str, image_size: int, tokenizer: Tokenizer | None) -> dict:
    """Return the content of config.json.

    Args:
        image_size: of the images, with the pixels that patches do not fill.
        tokenizer: for the special ids; None leaves them out but for what the text tower pools at.
    """
    sections = {}
    if parts.image is not None:
        sections["vision"] = _image_section(parts, family, image_size)
    if parts.text is not None:
        sections["text"] = _text_section(parts, family, tokenizer)
    head = {"architectures": [class_name(parts, family)], "dtype": "float32"}
    if parts.part != "both":
        return head | next(iter(sections.values()))
    whole = {"model_type": family, "text_config": sections["text"], "vision_config": sections["vision"]}
    return head | whole | ({"projection_dim": parts.embed_dim} if family == "clip" else {})


def _image_section(parts: Parts, family: str, image_size: int) -> dict:
    own = {"projection_dim": parts.embed_dim} if family == "clip" else {"vision_use_head": True}
    return {
        "model_type": f"{family}_vision_model",
        **_blocks(parts.image),
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": parts.image.patch_size,
        **own,
    }


def _text_section(parts: Parts, family: str, tokenizer: Tokenizer | None) -> dict:
    text = parts.text
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("pad", "bos", "eos")}
    if text.eos_id is not None:
        ids["eos_token_id"] = text.eos_id
    return {
        "model_type": f"{family}_text_model",
        **_blocks(text),
        **{theirs: getattr(text, ours) for theirs, ours in VOCABULARY.items()},
        **ids,
        "projection_dim" if family == "clip" else "projection_size": parts.embed_dim,
    }


def _blocks(config: ImageTowerConfig | TextTowerConfig) -> dict:
    return {
        **{theirs: getattr(config, ours) for theirs, ours in BLOCKS.items()},
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }
