"""open_clip's options of a model: their defaults, and what of them our towers have not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError, did_you_mean
from contrastive.interop.formats.option_kinds import check_like, is_like
from contrastive.models.attention import Activation

# Of open_clip's CLIP, CLIPVisionCfg and CLIPTextCfg (open_clip/model.py, 3.3).
MODEL = {
    "embed_dim": 512,
    "vision_cfg": {},
    "text_cfg": {},
    "quick_gelu": False,
    "custom_text": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "output_dict": False,
    "multimodal_cfg": None,
}
BLOCK = {
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "final_ln_after_pool": False,
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
VISION = BLOCK | {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "patch_size": 16,
    "image_size": 224,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
}
TEXT = BLOCK | {
    "context_length": 77,
    "vocab_size": 49408,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}
# Of options that are null by default, or may be, what they are like otherwise.
NULLABLE = {
    "init_logit_scale": 2.66,
    "init_logit_bias": -10.0,
    "multimodal_cfg": {},
    "ls_init_value": 0.1,
    "act_kwargs": {},
    "norm_kwargs": {},
    "block_type": "custom",
    "patch_size": 16,  # null in a ResNet
    "timm_model_name": "vit_base_patch16_224",
    "timm_pool": "map",
    "timm_proj": "linear",
    "timm_drop_path": 0.1,
    "hf_tokenizer_name": "organisation/name",
    "tokenizer_mode": "clips",
    "tokenizer_kwargs": {},
    "hf_model_name": "roberta-base",
}
POSITIVE = ("embed_dim", "layers", "width", "head_width", "patch_size", "image_size", "mlp_ratio")
POSITIVE += ("context_length", "vocab_size", "heads")
STRANGE_BLOCK = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def completed(section: str, given: Any, defaults: Mapping[str, Any], where: Path) -> dict:
    """Return the options of a section with open_clip's defaults where it is silent.

    Raises:
        UserError: an option that open_clip has not, or a value of another kind than the default; null is one too.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: {section} has to be an object with options, not {given!r}")
    for name, value in given.items():
        if name not in defaults:
            raise UserError(f"{where}: unknown option {section}.{name}.{did_you_mean(name, defaults)}")
        if not _fits(name, value, defaults[name]):
            check_like(f"{section}.{name}", value, NULLABLE.get(name, defaults[name]), where)
        if name in POSITIVE and any(side is not None and side <= 0 for side in _sides(value)):
            raise UserError(f"{where}: {section}.{name} is {value!r}; it has to be above 0")
    return {**defaults, **given}


def strange_vision(cfg: Mapping[str, Any]) -> list[str]:
    """Return the options of a native image tower that ours has not."""
    found = _strange_block("vision_cfg", cfg)
    if isinstance(cfg["layers"], list):
        found.append("vision_cfg.layers as a list (a ResNet)")
    if isinstance(cfg["patch_size"], list):
        found.append("vision_cfg.patch_size as a list (oblong patches)")
    if cfg["attentional_pool"]:
        found.append("vision_cfg.attentional_pool (CoCa's)")
    if cfg["final_ln_after_pool"] and cfg["pool_type"] == "avg":
        found.append("vision_cfg.final_ln_after_pool with pool_type 'avg'")
    if cfg["pool_type"] not in ("tok", "avg"):
        found.append(f"vision_cfg.pool_type '{cfg['pool_type']}'")
    if cfg["pos_embed_type"] not in ("learnable", "sin_cos_2d"):
        found.append(f"vision_cfg.pos_embed_type '{cfg['pos_embed_type']}'")
    return found


def strange_text(cfg: Mapping[str, Any]) -> list[str]:
    """Return the options of a text tower that ours has not."""
    if cfg["hf_model_name"]:
        return [f"text_cfg.hf_model_name '{cfg['hf_model_name']}' (a text tower of transformers)"]
    found = _strange_block("text_cfg", cfg)
    if cfg["embed_cls"]:
        found.append("text_cfg.embed_cls (CoCa's)")
    if cfg["pool_type"] not in ("argmax", "eos", "last"):
        found.append(f"text_cfg.pool_type '{cfg['pool_type']}'")
    if cfg["proj_type"] not in ("linear", "none"):
        found.append(f"text_cfg.proj_type '{cfg['proj_type']}'")
    return found


def activation(section: str, cfg: Mapping[str, Any], quick_gelu: bool, where: Path) -> Activation:
    """Return our name of the activation that `act_kwargs` and `quick_gelu` make; UserError for another."""
    extra = dict(cfg["act_kwargs"] or {})
    approximate = extra.pop("approximate", "none")
    if extra or approximate not in ("none", "tanh") or (quick_gelu and cfg["act_kwargs"]):
        with_quick = " with quick_gelu" if quick_gelu else ""
        raise UserError(f"{where}: {section}.act_kwargs {cfg['act_kwargs']}{with_quick} is no activation of ours")
    return "quick_gelu" if quick_gelu else "gelu_tanh" if approximate == "tanh" else "gelu"


def norm_eps(section: str, cfg: Mapping[str, Any], where: Path) -> float:
    """Return the epsilon of a tower's LayerNorms; UserError where `norm_kwargs` asks for more."""
    extra = dict(cfg["norm_kwargs"] or {})
    eps = extra.pop("eps", 1e-5)
    if extra or not isinstance(eps, float):
        raise UserError(f"{where}: {section}.norm_kwargs {cfg['norm_kwargs']}: our LayerNorm has eps alone, a number")
    return eps


def _strange_block(section: str, cfg: Mapping[str, Any]) -> list[str]:
    found = [f"{section}.{name}" for name in STRANGE_BLOCK if cfg[name]]
    if cfg["block_type"] not in (None, "default"):
        found.append(f"{section}.block_type '{cfg['block_type']}'")
    return found


def _fits(name: str, value: Any, default: Any) -> bool:
    if name in ("image_size", "patch_size", "layers") and isinstance(value, list):
        return all(type(side) is int for side in value) and len(value) == (4 if name == "layers" else 2)
    if name == "attentional_pool" and isinstance(value, str):
        return True
    if isinstance(default, Mapping) or (value is None and name in NULLABLE):  # sections are looked at one by one
        return True
    return is_like(value, NULLABLE.get(name, default))


def _sides(value: Any) -> list:
    return value if isinstance(value, list) else [value]
