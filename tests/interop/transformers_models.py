"""Small models of transformers with every weight drawn at random, biases and norms too, and their folders."""

import json
from pathlib import Path

import pytest
import torch

import contrastive
from contrastive.errors import UserError

VOCABULARY, LENGTH, EOS = 60, 10, 41
VISION_KEYS = ("image_size", "patch_size", "num_patches", "vision_use_head", "projection_dim")
# image size, patch size, width: odd ones on purpose
SHAPES = ((40, 8, 24), (56, 8, 40), (42, 14, 32))


def save_theirs(folder: Path, name: str, image_size=32, patch_size=8, width=32, **options) -> torch.nn.Module:
    """Save a random model of the library's class `name` by the library itself, and return it."""
    import transformers

    base = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**base, "image_size": image_size, "patch_size": patch_size}
    if name.startswith("Siglip2"):
        vision["num_patches"] = (vision.pop("image_size") // patch_size) ** 2
    text = {**base, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "eos_token_id": EOS}
    text |= {"bos_token_id": 40, "pad_token_id": 0, "projection_size": width}
    if name.startswith("CLIP"):
        text["projection_dim"] = vision["projection_dim"] = 24
    vision |= {key: value for key, value in options.items() if key in VISION_KEYS or key == "hidden_act"}
    text |= {key: value for key, value in options.items() if key not in VISION_KEYS}
    model_class = getattr(transformers, name)
    if "Vision" in name:
        config = model_class.config_class(**vision)
    elif "Text" in name:
        config = model_class.config_class(**text)
    else:
        projection = {"projection_dim": 24} if name == "CLIPModel" else {}
        config = model_class.config_class(vision_config=vision, text_config=text, **projection)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(width + image_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


def some_input(image_size: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and ids; every text has its eos somewhere, and some have it twice."""
    generator = torch.Generator().manual_seed(image_size)
    pixels = torch.randn(count, 3, image_size, image_size, generator=generator)
    tokens = torch.randint(1, 40, (count, LENGTH), generator=generator)
    tokens[torch.arange(count), torch.arange(count) + 4] = EOS
    tokens[:, 8] = EOS
    return pixels, tokens


def patches(pixels: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Pixels as Siglip2 takes them: (row, column, channel) of each patch, all of them valid."""
    grid = pixels.shape[-1] // size
    cut = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), grid**2, -1)
    mask = torch.ones(len(pixels), grid**2, dtype=torch.int32)
    return {
        "pixel_values": cut,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[grid, grid]] * len(mask)),
    }


def edit_json(file: Path, **values) -> None:
    """Set top-level values of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(folder: Path, words: str) -> None:
    """Assert that the folder does not load, and that one line with these words says why."""
    with pytest.raises(UserError, match=words) as caught:
        contrastive.load(folder)
    assert "\n" not in str(caught.value)
