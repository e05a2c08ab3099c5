"""The keys of transformers' SigLIP and CLIP state dicts, in both directions."""

import re
from collections.abc import Iterable, Mapping

import torch

from contrastive.interop.formats.key_table import Entry
from contrastive.interop.formats.state_dicts import renamed

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
HEAD_QUERY = re.compile(r"(.*head\.attention\.)q_proj\.(weight|bias)$")


def key_table(names: Iterable[str], family: str) -> list[Entry]:
    """Return what each of our names is called in a model of 'siglip' or 'clip'.

    The pooling head is torch's MultiheadAttention, which stacks queries, keys and values.
    """
    table, names = {**NAMES, **PROJECTIONS[family]}, list(names)
    entries = []
    for name in names:
        query = HEAD_QUERY.match(renamed(name, table))
        if query:
            stacked = tuple(name.replace("q_proj", f"{part}_proj") for part in "qkv")
            entries.append(Entry(f"{query[1]}in_proj_{query[2]}", stacked))
        elif not re.search(r"head\.attention\.[kv]_proj", name):
            unit_axes = int(name in SCALARS and family == "siglip")
            entries.append(Entry(renamed(name, table), (name,), unit_axes=unit_axes))
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
