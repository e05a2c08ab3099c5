"""The same function in the shape that the other library has: exact substitutes for parts that it lacks, or we lack."""

from collections.abc import Mapping

import torch

from contrastive.models import ImageTowerConfig, TextTowerConfig

HEAD = "vision_model.head."


def is_mean_head(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether SigLIP's attention head, by their names, is what `mean_head` writes: the mean of the tokens."""
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
            adapted |= {f"image_tower.head.{name}": tensor for name, tensor in mean_head(image).items()}
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


def mean_head(image: ImageTowerConfig) -> dict[str, torch.Tensor]:
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
