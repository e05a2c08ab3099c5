"""Our models in transformers' terms: what they can hold, config.json, and weights, which are read back too.

Keys are renamed; parts that one side lacks become exact substitutes of the same function in the shape of the other's.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.interop.formats.state_dicts import TensorNames, patch_convolution, patch_linear, renamed_table
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
from contrastive.models import ImageTowerConfig
from contrastive.models.transformer import AttentionPooling

# From our names to theirs, in this order: each pattern sees what those before it have made.
RENAMES = (
    (r"^image_tower\.", "vision_model."),
    (r"^text_tower\.", "text_model."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^text_model\.norm\.", "text_model.final_layer_norm."),
    (r"^vision_model\.pre_norm\.", "vision_model.pre_layrnorm."),  # as they spell it
    (r"\.head\.norm\.", ".head.layernorm."),
    (r"\.head\.attention\.[qkv]_proj\.", ".head.attention.in_proj_"),  # torch's MultiheadAttention
    (r"transformer\.blocks\.(\d+)\.attention\.", r"transformer.blocks.\1.self_attn."),
    (r"transformer\.blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"class_token", "embeddings.class_embedding"),
    (r"patch_embed\.", "embeddings.patch_embedding."),
    (r"token_embedding\.", "embeddings.token_embedding."),
    (r"position_embedding", "embeddings.position_embedding.weight"),
)
PROJECTIONS = {
    "clip": (
        (r"^vision_model\.projection\.", "visual_projection."),
        (r"^text_model\.projection\.", "text_projection."),
    ),
    "siglip": ((r"^text_model\.projection\.", "text_model.head."),),
}
PROJECTIONS["siglip2"] = PROJECTIONS["siglip"]
SCALARS = ("logit_scale", "logit_bias")
PATCHES = "image_tower.patch_embed.weight"
HEAD = "vision_model.head."
"""What the keys of the pooling head begin with."""


def towers_of(model: nn.Module) -> Towers:
    """Return the options of the model's towers as they are now; a classifier's head is none of them."""
    return {name: getattr(model, f"{name}_tower").config for name in SECTIONS if hasattr(model, f"{name}_tower")}


def fitting_family(model: nn.Module, name: str) -> str:
    """Return 'siglip', 'siglip2' (images of any shape) or 'clip', whichever can hold the model called `name` exactly.

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
        image_size: of the images, with the pixels that patches do not fill; SigLIP 2 has the number of positions.
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
        places = {"num_patches": towers["image"].num_patches} if family == "siglip2" else {"image_size": image_size}
        sections["image"] |= {"num_channels": 3, **places, "patch_size": towers["image"].patch_size}
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


def key_table(names: Iterable[str], family: str) -> list[TensorNames]:
    """Return what each of our names is called in a model of 'siglip', 'siglip2' or 'clip'."""
    unit_axes = {} if family == "clip" else dict.fromkeys(SCALARS, 1)
    return renamed_table(names, (*RENAMES, *PROJECTIONS[family]), unit_axes=unit_axes)


def plain(file: Mapping[str, torch.Tensor], alone: str | None, patch_size: int) -> dict[str, torch.Tensor]:
    """Return a file's tensors as transformers 5 would write them for a SiglipModel or CLIPModel.

    A tower alone may have its keys with or without the tower's prefix, the numbers of the positions may be there, a
    scalar may be a vector of one, and SigLIP 2 embeds patches by a Linear over (row, column, channel).

    Args:
        alone: 'image' or 'text', the only tower; None of a whole model.
    """
    prefix = f"{SECTIONS.get(alone)}_model."
    bare = alone is not None and not any(key.startswith(prefix) for key in file)
    tensors = {}
    for key, tensor in file.items():
        if key.endswith("embeddings.position_ids"):
            continue
        if bare and not key.endswith("_projection.weight"):
            key = prefix + key
        if key in SCALARS and tensor.shape == (1,):
            tensor = tensor.reshape(())
        if key.endswith("patch_embedding.weight"):
            tensor = patch_convolution(tensor, patch_size)
        tensors[key] = tensor
    return tensors


def is_mean_head(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether SigLIP's attention head, by their names, is what `_mean_head` writes: the mean of the tokens."""
    packed, out = weights.get(f"{HEAD}attention.in_proj_weight"), weights.get(f"{HEAD}attention.out_proj.weight")
    if packed is None or out is None or packed.ndim != 2 or packed.shape != (3 * out.shape[0], out.shape[0]):
        return False
    width = out.shape[0]
    zeros = ("attention.in_proj_bias", "attention.out_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    eye = torch.eye(width, dtype=packed.dtype)
    return (
        all(HEAD + name in weights and not weights[HEAD + name].any() for name in zeros)
        and not packed[: 2 * width].any()
        and torch.equal(packed[2 * width :], eye)
        and torch.equal(out, eye)
    )


def adapted(
    weights: Mapping[str, torch.Tensor], towers: Towers, family: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights by our names as a model of 'siglip', 'siglip2' or 'clip' has them.

    SigLIP's towers all have a patch bias, an attention head and a text projection, CLIP's no patch bias, and both are
    projected if both are here. The notes say in plain sentences what of the model that puts in other terms.
    """
    made, notes = dict(weights), []
    if "image" in towers and towers["image"].position == "sincos":
        notes.append("the fixed sin-cos positions are written as learned ones")
    for tensors, note in (_clip_parts if family == "clip" else _siglip_parts)(weights, towers):
        made |= tensors
        notes.append(note)
    if family == "siglip2" and "image" in towers:
        made[PATCHES] = patch_linear(made[PATCHES])
    if family == "clip":
        made.pop("logit_bias", None)  # zero, or it would not fit
        made.pop("image_tower.patch_embed.bias", None)
    return made, notes


Parts = Iterator[tuple[dict[str, torch.Tensor], str]]
"""Tensors that stand for something that one side lacks, and what to tell of them."""


def _siglip_parts(weights: Mapping[str, torch.Tensor], towers: Towers) -> Parts:
    image, text = towers.get("image"), towers.get("text")
    if image is not None and image.pool == "average":
        head = {f"image_tower.head.{name}": tensor for name, tensor in _mean_head(image).items()}
        yield head, "the mean over patches is written as an attention head that attends to all alike"
    if image is not None and not image.patch_bias:
        bias = {"image_tower.patch_embed.bias": torch.zeros(image.width)}
        yield bias, "the patch embedding, which has no bias, gets one of zero"
    projection = "text_tower.projection"
    if text is not None and not text.projection:
        identity = {f"{projection}.weight": torch.eye(text.width), f"{projection}.bias": torch.zeros(text.width)}
        yield identity, "the text tower, which has no projection, gets the identity"
    elif text is not None and not text.projection_bias:
        bias = {f"{projection}.bias": torch.zeros(len(weights[f"{projection}.weight"]))}
        yield bias, "the text projection, which has no bias, gets one of zero"
    if len(towers) == 2 and "logit_bias" not in weights:
        yield {"logit_bias": torch.zeros(())}, "the logits, which have no bias, get one of zero"


def _clip_parts(weights: Mapping[str, torch.Tensor], towers: Towers) -> Parts:
    bias, position = weights.get("image_tower.patch_embed.bias"), "image_tower.position_embedding"
    if bias is not None:  # every patch gets it, and every patch gets a position
        moved = torch.cat([weights[position][:1], weights[position][1:] + bias])
        yield {position: moved}, "the bias of the patch embedding is added to the positions"
    for tower, config in towers.items():
        if len(towers) == 2 and not config.projection:
            identity = {f"{tower}_tower.projection.weight": torch.eye(config.width)}
            yield identity, f"the {tower} tower, which has no projection, gets the identity"


def _mean_head(image: ImageTowerConfig) -> dict[str, torch.Tensor]:
    """An attention head that returns the mean of the tokens.

    Queries and keys of zero attend to all tokens alike, values and output are the identity, and the MLP adds zero.
    """
    width = image.width
    with torch.device("meta"):
        shapes = AttentionPooling(image).state_dict()
    head = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    identity = dict.fromkeys(("attention.v_proj.weight", "attention.out_proj.weight"), torch.eye(width))
    return head | identity | {"norm.weight": torch.ones(width)}
