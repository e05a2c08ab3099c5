"""Weights of transformers' CLIPModel and SiglipModel fit our towers one to one and give the same features."""

import pytest
import torch

from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig

SHAPE = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 64}
THEIRS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn": "attention",
    "encoder.layers": "transformer.blocks",
}


def rename(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name


def siglip():
    from transformers import SiglipConfig, SiglipModel

    theirs = SiglipModel(
        SiglipConfig(
            vision_config={**THEIRS, "image_size": 32, "patch_size": 8},
            text_config={**THEIRS, "vocab_size": 50, "max_position_embeddings": 10, "projection_size": 32},
        )
    )
    ours = ModelConfig(
        embed_dim=32,
        image=ImageTowerConfig(image_size=32, patch_size=8, **SHAPE),
        text=TextTowerConfig(vocab_size=50, context_length=10, **SHAPE),
        init_logit_bias=0.0,
    )
    table = {
        **BLOCK,
        "vision_model.": "image_tower.",
        "text_model.head.": "text_tower.projection.",
        "text_model.": "text_tower.",
        "embeddings.patch_embedding": "patch_embed",
        "embeddings.position_embedding.weight": "position_embedding",
        "embeddings.token_embedding": "token_embedding",
        "post_layernorm": "norm",
        "final_layer_norm": "norm",
        "head.layernorm": "head.norm",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = rename(name, table)
        if "in_proj" in name:  # their head packs the three projections
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            weights[name] = tensor
    return theirs, ours, weights


def clip():
    from transformers import CLIPConfig, CLIPModel

    theirs = CLIPModel(
        CLIPConfig(
            vision_config={**THEIRS, "image_size": 32, "patch_size": 8},
            text_config={**THEIRS, "vocab_size": 50, "max_position_embeddings": 10, "eos_token_id": 49},
            projection_dim=24,
        )
    )
    shared = {**SHAPE, "activation": "quick_gelu", "norm_eps": 1e-5}
    ours = ModelConfig(
        embed_dim=24,
        image=ImageTowerConfig(
            image_size=32,
            patch_size=8,
            pool="class",
            class_token=True,
            pre_norm=True,
            patch_bias=False,
            projection=True,
            **shared,
        ),
        text=TextTowerConfig(
            vocab_size=50, context_length=10, causal=True, pool="eos", projection_bias=False, eos_id=49, **shared
        ),
    )
    table = {
        **BLOCK,
        "visual_projection": "image_tower.projection",
        "text_projection": "text_tower.projection",
        "vision_model.": "image_tower.",
        "text_model.": "text_tower.",
        "embeddings.class_embedding": "class_token",
        "embeddings.patch_embedding": "patch_embed",
        "embeddings.position_embedding.weight": "position_embedding",
        "embeddings.token_embedding": "token_embedding",
        "pre_layrnorm": "pre_norm",
        "post_layernorm": "norm",
        "final_layer_norm": "norm",
    }
    return theirs, ours, {rename(name, table): tensor for name, tensor in theirs.state_dict().items()}


@pytest.mark.parametrize("family", [siglip, clip])
def test_same_weights_same_features(family):
    torch.manual_seed(0)
    theirs, config, weights = family()
    for tensor in weights.values():  # biases and norms too, which start at 0 and 1
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    theirs.eval()
    ours = DualEncoder(config).eval()
    own = ours.state_dict()
    fitted = {name: tensor.reshape(own[name].shape) for name, tensor in weights.items() if name in own}
    assert fitted.keys() == own.keys()
    assert {name for name in weights if name not in own} <= {name for name in weights if "position_ids" in name}
    ours.load_state_dict(fitted)
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 49, (3, 10))
    tokens[:, 7] = 49
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=pixels).pooler_output
        text = theirs.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(ours.encode_image(pixels, normalize=False), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=False), text, rtol=1e-4, atol=1e-5)
        hidden = theirs.vision_model(pixel_values=pixels).last_hidden_state
        if config.image.pool == "attention":  # CLIPModel does not normalise its last hidden state
            features = ours.image_tower.forward_features(pixels)
            torch.testing.assert_close(features, hidden, rtol=1e-4, atol=1e-5)
