"""The weights of transformers' SigLIP and CLIP models and ours, in both directions.

Keys are renamed; parts that one side lacks become exact substitutes of the same function in the shape of the other's.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from contrastive.interop.formats.key_table import Entry
from contrastive.models import ImageTowerConfig, TextTowerConfig

# In this order; each name is ours at first and theirs at the end.
NAMES = {
    "image_tower.": "vision_model.",
    "text_tower.": "text_model.",
    "vision_model.norm.": "vision_model.post_layernorm.",
    "text_model.norm.": "text_model.final_layer_norm.",
    "vision_model.pre_norm.": "vision_model.pre_layrnorm.",
    "head.norm.": "head.layernorm.",
    "transformer.blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attention.": ".self_attn.",
    "head.self_attn.": "head.attention.",
    "class_token": "embeddings.class_embedding",
    "patch_embed.": "embeddings.patch_embedding.",
    "token_embedding.": "embeddings.token_embedding.",
    "position_embedding": "embeddings.position_embedding.weight",
}
PROJECTIONS = {
    "clip": {"vision_model.projection.": "visual_projection.", "text_model.projection.": "text_projection."},
    "siglip": {"text_model.projection.": "text_model.head."},
}
PREFIXES = {"image": "vision_model.", "text": "text_model."}
SCALARS = ("logit_scale", "logit_bias")
HEAD = "vision_model.head."
HEAD_QUERY = re.compile(r"(.*head\.attention\.)q_proj\.(weight|bias)$")


def key_table(names: Iterable[str], family: str) -> list[Entry]:
    """Return what each of our names is called in a model of 'siglip' or 'clip'.

    The pooling head is torch's MultiheadAttention, which stacks queries, keys and values.
    """
    table, names = {**NAMES, **PROJECTIONS[family]}, list(names)
    entries = []
    for name in names:
        theirs = name
        for old, new in table.items():
            theirs = theirs.replace(old, new)
        query = HEAD_QUERY.match(theirs)
        if query:
            stacked = tuple(name.replace("q_proj", f"{part}_proj") for part in "qkv")
            entries.append(Entry(f"{query[1]}in_proj_{query[2]}", stacked))
        elif not re.search(r"head\.attention\.[kv]_proj", name):
            unit_axes = int(name in SCALARS and family == "siglip")
            entries.append(Entry(theirs, (name,), unit_axes=unit_axes))
    return entries


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


def without_head(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights, by their names, without those of the pooling head."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)}


def as_siglip(
    weights: Mapping[str, torch.Tensor], image: ImageTowerConfig | None, text: TextTowerConfig | None
) -> dict[str, torch.Tensor]:
    """Return weights by our names, for towers that all have a patch bias, an attention head and a text projection."""
    adapted = dict(weights)
    if image is not None:
        adapted.setdefault("image_tower.patch_embed.bias", torch.zeros(image.width))
        if image.pool == "average":
            adapted |= {f"image_tower.head.{name}": tensor for name, tensor in _mean_head(image).items()}
    if text is not None:
        if not text.projection:
            adapted["text_tower.projection.weight"] = torch.eye(text.width)
        rows = adapted["text_tower.projection.weight"].shape[0]
        adapted.setdefault("text_tower.projection.bias", torch.zeros(rows))
    return adapted


def as_clip(
    weights: Mapping[str, torch.Tensor], image: ImageTowerConfig | None, text: TextTowerConfig | None
) -> dict[str, torch.Tensor]:
    """Return weights by our names, for towers without patch bias, and both projected if both are here."""
    adapted, both = dict(weights), image is not None and text is not None
    bias = adapted.pop("image_tower.patch_embed.bias", None)
    if bias is not None:  # every patch gets it, and every patch gets a position
        positions = adapted["image_tower.position_embedding"].clone()
        positions[1:] += bias
        adapted["image_tower.position_embedding"] = positions
    for tower, config in (("image_tower", image), ("text_tower", text)):
        if both and not config.projection:
            adapted[f"{tower}.projection.weight"] = torch.eye(config.width)
    return adapted


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
