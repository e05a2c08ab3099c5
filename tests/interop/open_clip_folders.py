"""Folders of open_clip as that library's users have them: tiny, random weights, every bias and norm random too."""

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

VISION = {"image_size": 40, "patch_size": 8, "width": 24, "head_width": 8, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 40, "heads": 4, "layers": 2}
SIGLIP_TEXT = TEXT | {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
    "hf_tokenizer_name": "organisation/tokenizer",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
SIZES = [(40, 8, 24, 3), (56, 8, 40, 4), (42, 14, 36, 3)]  # image, patch, width, heads


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every weight anew: zeros and ones would hide a bias or a norm in the wrong place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim and not name.endswith(("logit_scale", "logit_bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15 + 0.3 * (tensor.ndim == 1))


def clip_config(image=40, patch=8, width=24, heads=3, **more) -> dict:
    """model_cfg of open_clip's own ViT."""
    shape = {"image_size": image, "patch_size": patch, "width": width, "head_width": width // heads}
    return {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION | shape, "text_cfg": TEXT} | more


def siglip_config(folder: Path, image=40, patch=8, width=24, heads=3, pool="map") -> dict:
    """model_cfg with a tower of timm, whose config.json is written into the folder by timm itself."""
    arguments = {"img_size": image, "patch_size": patch, "embed_dim": width, "depth": 2, "num_heads": heads}
    arguments |= {"mlp_ratio": 2.5, "act_layer": "gelu_tanh", "num_classes": 0}
    arguments |= {"global_pool": "avg", "fc_norm": False} if pool == "avg" else {}
    name = "vit_base_patch16_siglip_224" if pool == "map" else "vit_base_patch16_siglip_gap_224"
    folder.mkdir(parents=True, exist_ok=True)
    save_config_for_hf(timm.create_model(name, **arguments), folder / "config.json")
    vision = {"image_size": image, "timm_model_name": f"local-dir:{folder}", "timm_pool": pool, "timm_proj": "none"}
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": SIGLIP_TEXT,
    }


def write_config(folder: Path, model_cfg: dict, preprocess_cfg: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    description = {"model_cfg": model_cfg} | ({} if preprocess_cfg is None else {"preprocess_cfg": preprocess_cfg})
    (folder / "open_clip_config.json").write_text(json.dumps(description))


def open_clip_folder(folder: Path, model_cfg: dict, preprocess_cfg: dict | None = None, **options) -> torch.nn.Module:
    """Let open_clip make the model with random weights, save both, and return the model in eval mode."""
    write_config(folder, model_cfg, preprocess_cfg)
    logging.disable(logging.WARNING)  # of random weights
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, **options)
    logging.disable(logging.NOTSET)
    randomise(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval()


def inputs(model: torch.nn.Module, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and ids of which one is the highest of its row, at another place in each."""
    generator = torch.Generator().manual_seed(1)
    size = model.visual.image_size
    pixels = torch.randn(count, 3, *((size, size) if isinstance(size, int) else size), generator=generator)
    highest = model.vocab_size - 1
    tokens = torch.randint(0, highest, (count, model.context_length), generator=generator)
    tokens[torch.arange(count), torch.arange(count) + 4] = highest
    return pixels, tokens


def largest_difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Over both embeddings of the same pixels and ids."""
    pixels, tokens = inputs(theirs)
    with torch.no_grad():
        image = ours.encode_image(pixels) - theirs.encode_image(pixels, normalize=True)
        text = ours.encode_text(tokens) - theirs.encode_text(tokens, normalize=True)
    return max(image.abs().max().item(), text.abs().max().item())


def pictures(count: int) -> list[Image.Image]:
    """Coloured noise, smooth at a distance, of several sizes."""
    rng = np.random.default_rng(0)
    sizes = [(320, 240), (200, 300), (97, 131)][:count]
    coarse = (rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in sizes)
    return [Image.fromarray(noise).resize(size, Image.BICUBIC) for noise, size in zip(coarse, sizes, strict=True)]
