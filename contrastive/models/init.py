"""Initial weights, as the papers' code draws them."""

import math
from typing import Literal

import torch
from torch import nn

from contrastive.models.image_tower import ImageTower
from contrastive.models.text_tower import TextTower
from contrastive.models.transformer import MLP, Attention, AttentionPooling

InitStyle = Literal["clip", "siglip", "mimetic"]


def initialise_tower(tower: ImageTower | TextTower, style: InitStyle) -> None:
    """Draw all weights of one tower in place from torch's global generator."""
    std = tower.config.width**-0.5
    is_clip = style == "clip"
    initialise_blocks(tower, style)
    if isinstance(tower, TextTower):
        initialise_token_inputs(tower, style)
    else:
        _init_image_inputs(tower, std)
        if is_clip and tower.class_token is not None:  # in big_vision it starts at zero
            nn.init.normal_(tower.class_token, std=std)
    if tower.projection is not None:
        _normal(tower.projection, std)


def initialise_blocks(tower: nn.Module, style: InitStyle) -> None:
    """Draw the weights of all attention and MLPs of what has a `config` and a `transformer`."""
    (_init_clip_blocks if style == "clip" else _init_siglip_blocks)(tower)
    if style == "mimetic":
        for block in tower.transformer.blocks:
            _init_mimetic_attention(block.attention)


def initialise_token_inputs(tower: nn.Module, style: InitStyle) -> None:
    """Draw the `token_embedding` and `position_embedding` of what reads token ids."""
    std = tower.config.width**-0.5
    nn.init.normal_(tower.token_embedding.weight, std=0.02 if style == "clip" else std)
    nn.init.normal_(tower.position_embedding, std=0.01 if style == "clip" else std)


def _init_clip_blocks(tower: nn.Module) -> None:
    """OpenAI CLIP's `initialize_parameters`: residual branches shrink with depth, all else with width.

    OpenAI draws only the text tower so; both towers follow it here, as in transformers' CLIPModel.
    """
    width, depth = tower.config.width, tower.config.depth
    residual_std = width**-0.5 * (2 * depth) ** -0.5
    for module in tower.modules():
        if isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                _normal(projection, width**-0.5)
            _normal(module.out_proj, residual_std)
        elif isinstance(module, MLP):
            _normal(module.fc1, (2 * width) ** -0.5)
            _normal(module.fc2, residual_std)
        elif isinstance(module, AttentionPooling):
            nn.init.normal_(module.probe, std=width**-0.5)


def _init_siglip_blocks(tower: nn.Module) -> None:
    """big_vision `models/vit.py`: Xavier-uniform matrices, tiny MLP biases."""
    for module in tower.modules():
        if isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)
        elif isinstance(module, MLP):
            for layer in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
        elif isinstance(module, AttentionPooling):
            nn.init.xavier_uniform_(module.probe.data[0])


@torch.no_grad()
def _init_mimetic_attention(attention: Attention) -> None:
    """Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers".

    A head's queries and keys start alike, so that tokens look at those like themselves, and positions at their
    neighbours; what is read and put out again starts near a negative identity. Z has entries of variance 1 / D:
    W_q W_kᵀ ≈ 0.7 Z + 0.7 I, to the rank of a head, and W_v W_out ≈ 0.4 Z − 0.4 I. On small data sets alone.
    """
    width = attention.q_proj.in_features
    identity, size = torch.eye(width), width // attention.num_heads
    for head in range(attention.num_heads):
        rows = slice(head * size, (head + 1) * size)
        u, s, v = torch.linalg.svd(0.7 * torch.randn(width, width) * width**-0.5 + 0.7 * identity)
        attention.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        attention.k_proj.weight[rows] = v[:size] * s[:size, None].sqrt()
    u, s, v = torch.linalg.svd(0.4 * torch.randn(width, width) * width**-0.5 - 0.4 * identity)
    attention.out_proj.weight.copy_(u * s.sqrt())
    attention.v_proj.weight.copy_(v * s[:, None].sqrt())


def _init_image_inputs(tower: ImageTower, position_std: float) -> None:
    fan_in = 3 * tower.config.patch_size**2
    nn.init.normal_(tower.patch_embed.weight, std=math.sqrt(1 / fan_in))
    if tower.patch_embed.bias is not None:
        nn.init.zeros_(tower.patch_embed.bias)
    if tower.config.position == "learned":
        nn.init.normal_(tower.position_embedding, std=position_std)


def _normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
