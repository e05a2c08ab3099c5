"""The weights of transformers' SigLIP and CLIP models and ours, in both directions.

Keys are renamed; parts that one side lacks become exact substitutes of the same function in the shape of the other's.
"""

from collections.abc import Iterable, Mapping

import torch

from contrastive.interop.formats.key_table import TensorNames, renamed_table
from contrastive.models import ImageTowerConfig, TextTowerConfig

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
PREFIXES = {"image": "vision_model.", "text": "text_model."}
SCALARS = ("logit_scale", "logit_bias")
HEAD = "vision_model.head."
"""What the keys of the pooling head begin with."""


def key_table(names: Iterable[str], family: str) -> list[TensorNames]:
    """Return what each of our names is called in a model of 'siglip' or 'clip'."""
    unit_axes = dict.fromkeys(SCALARS, 1) if family == "siglip" else {}
    return renamed_table(names, (*RENAMES, *PROJECTIONS[family]), unit_axes=unit_axes)


def plain(file: Mapping[str, torch.Tensor], part: str, patch_size: int) -> dict[str, torch.Tensor]:
    """Return a file's tensors as transformers 5 would write them for a SiglipModel or CLIPModel.

    A tower alone may have its keys with or without the tower's prefix, the numbers of the positions may be there, a
    scalar may be a vector of one, and SigLIP 2 embeds patches by a Linear over (row, column, channel).
    """
    prefix = PREFIXES.get(part)
    bare = prefix is not None and not any(key.startswith(prefix) for key in file)
    tensors = {}
    for key, tensor in file.items():
        if key.endswith("embeddings.position_ids"):
            continue
        if bare and not key.endswith("_projection.weight"):
            key = prefix + key
        if key in SCALARS and tensor.shape == (1,):
            tensor = tensor.reshape(())
        if key.endswith("patch_embedding.weight") and tensor.ndim == 2 and tensor.shape[1] == 3 * patch_size**2:
            tensor = tensor.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2).contiguous()
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


def as_siglip(
    weights: Mapping[str, torch.Tensor], image: ImageTowerConfig | None, text: TextTowerConfig | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights by our names, for towers that all have a patch bias, an attention head and a text projection.

    The notes say in plain sentences what of the model that puts in other terms.
    """
    adapted, notes = dict(weights), _position_notes(image)
    if image is not None and image.pool == "average":
        adapted |= {f"image_tower.head.{name}": tensor for name, tensor in _mean_head(image).items()}
        notes.append("the mean over patches is written as an attention head that attends to all alike")
    if image is not None and not image.patch_bias:
        adapted["image_tower.patch_embed.bias"] = torch.zeros(image.width)
        notes.append("the patch embedding, which has no bias, gets one of zero")
    if text is not None and not text.projection:
        adapted["text_tower.projection.weight"] = torch.eye(text.width)
        adapted["text_tower.projection.bias"] = torch.zeros(text.width)
        notes.append("the text tower, which has no projection, gets the identity")
    elif text is not None and not text.projection_bias:
        rows = adapted["text_tower.projection.weight"].shape[0]
        adapted["text_tower.projection.bias"] = torch.zeros(rows)
        notes.append("the text projection, which has no bias, gets one of zero")
    if image is not None and text is not None and "logit_bias" not in adapted:
        adapted["logit_bias"] = torch.zeros(())
        notes.append("the logits, which have no bias, get one of zero")
    return adapted, notes


def as_clip(
    weights: Mapping[str, torch.Tensor], image: ImageTowerConfig | None, text: TextTowerConfig | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights by our names, for towers without patch bias, and both projected if both are here; and notes."""
    adapted, notes, both = dict(weights), _position_notes(image), image is not None and text is not None
    adapted.pop("logit_bias", None)  # zero, or it would not fit
    bias = adapted.pop("image_tower.patch_embed.bias", None)
    if bias is not None:  # every patch gets it, and every patch gets a position
        positions = adapted["image_tower.position_embedding"].clone()
        positions[1:] += bias
        adapted["image_tower.position_embedding"] = positions
        notes.append("the bias of the patch embedding is added to the positions")
    for tower, config in (("image", image), ("text", text)):
        if both and not config.projection:
            adapted[f"{tower}_tower.projection.weight"] = torch.eye(config.width)
            notes.append(f"the {tower} tower, which has no projection, gets the identity")
    return adapted, notes


def _position_notes(image: ImageTowerConfig | None) -> list[str]:
    fixed = image is not None and image.position == "sincos"
    return ["the fixed sin-cos positions are written as learned ones"] if fixed else []


def _mean_head(image: ImageTowerConfig) -> dict[str, torch.Tensor]:
    """An attention head that returns the mean of the tokens.

    Queries and keys of zero attend to all tokens alike, values and output are the identity, and the MLP adds zero.
    """
    width, zeros = image.width, torch.zeros
    head = {"probe": zeros(1, 1, width), "norm.weight": torch.ones(width), "norm.bias": zeros(width)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        is_identity = name in ("v_proj", "out_proj")
        head[f"attention.{name}.weight"] = torch.eye(width) if is_identity else zeros(width, width)
        head[f"attention.{name}.bias"] = zeros(width)
    head |= {"mlp.fc1.weight": zeros(image.mlp_dim, width), "mlp.fc1.bias": zeros(image.mlp_dim)}
    return head | {"mlp.fc2.weight": zeros(width, image.mlp_dim), "mlp.fc2.bias": zeros(width)}
