"""Our options as a config.json of transformers, and what there is no such file for."""

from collections.abc import Iterable

from torch import nn

from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.interop.formats.transformers_config import (
    ACTIVATIONS,
    BLOCKS,
    ENDINGS,
    FITTING,
    LEGACY_EOS,
    PROJECTED,
    SECTIONS,
    STEMS,
    VOCABULARY,
    Towers,
)


def towers_of(model: nn.Module) -> Towers:
    """Return the options of the model's towers as they are now; a classifier's head is none of them."""
    return {name: getattr(model, f"{name}_tower").config for name in SECTIONS if hasattr(model, f"{name}_tower")}


def fitting_family(model: nn.Module, name: str) -> str:
    """Return 'siglip' or 'clip', whichever can hold the model exactly.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: neither can; all that does not fit the nearer one is named.
    """
    found = {family: [*_problems(model, family)] for family in FITTING}
    family = min(found, key=lambda name: len(found[name]))
    if not found[family]:
        return family
    wrong = "; ".join(text for text, _ in found[family])
    flags = " ".join(flag for _, flag in found[family] if flag)
    retrain = f"train it with {flags}, or " if flags else ""
    their_name = class_name(towers_of(model), family)
    raise UserError(f"{name} cannot be written as {their_name}: {wrong}; {retrain}export it --to onnx")


def _problems(model: nn.Module, family: str) -> Iterable[tuple[str, str | None]]:
    """What does not fit, and the flag of a run that would."""
    towers = towers_of(model)
    their_name = class_name(towers, family)
    for tower, config in towers.items():
        for option, possible in FITTING[family][tower].items():
            value = getattr(config, option)
            if value in possible or (option == "projection_bias" and not config.projection):
                continue
            flag = f"--model.{tower}.{option} {possible[0]}"
            if isinstance(possible[0], bool):
                flag = f"--model.{tower}.{'' if possible[0] else 'no_'}{option}"
            has = " or ".join(str(each).lower() for each in possible)
            yield f"model.{tower}.{option} is {str(value).lower()}, {their_name} has {has}", flag
    if "image" in towers and len(set(model.image_tower.grid)) > 1:
        rows, columns = model.image_tower.grid
        yield f"its positions are a grid of {rows}×{columns}, {their_name} has squares (set_input_size(SIDE))", None
    bias = getattr(model, "logit_bias", None)
    if family == "clip" and bias:
        yield f"logit_bias is {bias.item():.4g}, {their_name} has none", "--loss softmax"
    if family == "clip" and "text" in towers and towers["text"].eos_id == LEGACY_EOS:
        yield (
            f"its end-of-text token is id {LEGACY_EOS}, by which {their_name} means the highest id of a text (train "
            "its tokenizer anew: eos is id 1 now)",
            None,
        )


def class_name(towers: Towers, family: str) -> str:
    """The class of transformers that holds the model."""
    ending = next(ending for ending, has in ENDINGS.items() if has == tuple(towers))
    projected = family == "clip" and len(towers) == 1 and next(iter(towers.values())).projection
    return f"{STEMS[family]}{ending}{PROJECTED if projected else ''}"


def their_config(towers: Towers, family: str, embed_dim: int, image_size: int, tokenizer: Tokenizer | None) -> dict:
    """Return the content of config.json.

    Args:
        image_size: of the images, with the pixels that patches do not fill.
        tokenizer: for the special ids; None leaves them out but for what the text tower pools at.
    """
    sections, is_clip = {}, family == "clip"
    for tower, config in towers.items():
        sections[tower] = {
            "model_type": f"{family}_{SECTIONS[tower]}_model",
            **{theirs: getattr(config, ours) for theirs, ours in BLOCKS.items()},
            "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
            "attention_dropout": 0.0,
        }
    if "image" in towers:
        sections["image"] |= {"num_channels": 3, "image_size": image_size, "patch_size": towers["image"].patch_size}
        sections["image"] |= {"projection_dim": embed_dim} if is_clip else {"vision_use_head": True}
    if "text" in towers:
        sections["text"] |= {theirs: getattr(towers["text"], ours) for theirs, ours in VOCABULARY.items()}
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("pad", "bos", "eos")}
        pooled = {} if towers["text"].eos_id is None else {"eos_token_id": towers["text"].eos_id}
        sections["text"] |= ids | pooled | {"projection_dim" if is_clip else "projection_size": embed_dim}
    head = {"architectures": [class_name(towers, family)], "dtype": "float32"}
    if len(towers) == 1:
        return head | next(iter(sections.values()))
    whole = {"model_type": family} | {f"{SECTIONS[tower]}_config": options for tower, options in sections.items()}
    return head | whole | ({"projection_dim": embed_dim} if is_clip else {})
