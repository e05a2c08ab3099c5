"""open_clip's model_cfg and our options, both ways."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from contrastive.errors import UserError, did_you_mean
from contrastive.interop.formats.evaluation_transform import both_sides, size_option, whole_patches
from contrastive.interop.formats.timm_architecture import mlp_ratio
from contrastive.interop.formats.tokenizer_files import CLIP_EOS_ID, CLIP_PAD_ID, CLIP_VOCABULARY
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.transformer import Activation

THEIR_POOLS = {"class": "tok", "average": "avg"}
# Options that are the same number on both sides, by open_clip's name.
IMAGE_NUMBERS = {"patch_size": "patch_size", "width": "width", "layers": "depth", "patch_dropout": "patch_dropout"}
TEXT_NUMBERS = {
    "context_length": "context_length",
    "vocab_size": "vocab_size",
    "width": "width",
    "heads": "num_heads",
    "layers": "depth",
}
# What open_clip's own files hold beside what its fields are annotated with: a ResNet's patch_size is null.
ALSO_TAKEN = {
    "patch_size": int | tuple[int, int] | None,
    "timm_pool": str | None,
    "timm_proj": str | None,
    "attentional_pool": bool | str,
    "eos_id": int | None,
    "pad_id": int | None,
}
# What open_clip 4 adds, with the values that change nothing, by its public code and tests of 2026: the classes of its
# options, their defaults, and what reads them. None: any value, for what reads it is refused.
_OFF = (False, None)
_UNREAD = ("bos_id", "tiktoken_name", "attention_mode", "mlp_type", "norm_eps", "pos_embed", "rope_temperature")
NEUTRAL = {
    "model_cfg": dict.fromkeys(("audio_cfg", "genlip_cfg", "genlap_cfg"), (None,)),
    "vision_cfg": {"image_seq_len": (None,), "timm_model_kwargs": (None, {})},
    "text_cfg": {"text_arch": ("clip", "", None), "tokenizer_type": ("", None), "norm_placement": ("pre", None)}
    | {"pos_embed_type": ("learnable", None), "act_layer": ("", None), "hf_model_config": (None, {})}
    | dict.fromkeys(("attention_bias", "mlp_bias", "gate_bias", "norm_type"), (None,))
    | dict.fromkeys(("variable_text", "use_pad_mask", "scale_sqrt_depth", "attn_gated", "pre_norm"), _OFF)
    | dict.fromkeys(("value_residual", "zero_init_residual", "reg_tokens", "correct_cls_mask"), _OFF)
    | dict.fromkeys(_UNREAD),
}
# Two of these mean something of a tower of timm: what timm.create_model gets beside the name, and how many patches
# evaluation gives an image of any shape at most (none: as the command line says).
OF_TIMM = {"timm_model_kwargs": dict | None, "image_seq_len": int | None}
POSITIVE = ("embed_dim", "image_seq_len", "layers", "width", "head_width", "patch_size", "image_size", "mlp_ratio")
POSITIVE += ("context_length", "vocab_size", "heads")
EXAMPLES = {str: "text", float: 2.66, int: 1, dict: {}}


@dataclass(frozen=True)
class ModelCfg:
    """open_clip's options beside its towers, for which it has no class of its own as for theirs."""

    embed_dim: int = 512
    vision_cfg: Any = None
    text_cfg: Any = None
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    output_dict: bool = False
    multimodal_cfg: dict | None = None


def read_sections(model_cfg: Any, where: Path) -> tuple[dict, dict, dict]:
    """Return the options of the model, its image and its text tower; where the file is silent open_clip's defaults.

    Args:
        model_cfg: what the file has under this key, whatever it is.

    Raises:
        UserError: an option that open_clip has not, or of another type than open_clip's own class says; or options that
            our towers have not, all of which are named.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model = _completed("model_cfg", model_cfg, ModelCfg, where)
    vision = _completed("vision_cfg", model_cfg.get("vision_cfg", {}), CLIPVisionCfg, where)
    text = _completed("text_cfg", model_cfg.get("text_cfg", {}), CLIPTextCfg, where)
    _check_expressible(model, vision, text, where)
    return model, vision, text


def _completed(section: str, given: Any, config_class: type, where: Path) -> dict:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: {section} has to be an object with options, not {given!r}")
    defaults = {field.name: field.default for field in fields(config_class)}
    types = get_type_hints(config_class) | ALSO_TAKEN
    if section == "vision_cfg" and given.get("timm_model_name"):
        defaults, types = defaults | dict.fromkeys(OF_TIMM), types | OF_TIMM
    for name, value in given.items():
        if name in NEUTRAL[section] and name not in types:
            harmless = NEUTRAL[section][name]
            if harmless is not None and value not in harmless:
                raise UserError(f"{where}: our towers have no {section}.{name} {value!r}; open_clip itself can load it")
            continue
        if name not in defaults:
            raise UserError(f"{where}: unknown option {section}.{name}.{did_you_mean(name, defaults)}")
        default = defaults[name]
        # Some fields that are null by default are annotated as if they never were.
        if not (_is(value, types[name]) or (value is None and default is None)):
            example = _example(types[name]) if default is None else default
            wanted = "an object with options" if isinstance(example, Mapping) else f"like {example!r}"
            raise UserError(f"{where}: {section}.{name} is {value!r}; it has to be {wanted}")
        sides = value if isinstance(value, list) else [value]
        if name in POSITIVE and any(side is not None and side <= 0 for side in sides):
            raise UserError(f"{where}: {section}.{name} is {value!r}; it has to be above 0")
    return {**defaults, **given}


def _is(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is of a type: a tuple is a list there, a float may be a whole number, true is none."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(_is(value, option) for option in inner)
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_is, value, inner))
    return kind is Any or type(value) in ((int, float) if kind is float else (kind,))


def _example(annotation: Any) -> Any:
    """A value of the type, for messages about options that are null by default."""
    kind = get_args(annotation)[0] if get_origin(annotation) in (Union, UnionType) else annotation
    return EXAMPLES[get_origin(kind) or kind]


def _check_expressible(
    model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any], where: Path
) -> None:
    strange = {"multimodal_cfg (CoCa)": model["multimodal_cfg"]}
    if not vision["timm_model_name"]:
        pool, position = vision["pool_type"], vision["pos_embed_type"]
        strange |= _strange_blocks("vision_cfg", vision) | {
            "vision_cfg.layers as a list (a ResNet)": isinstance(vision["layers"], list),
            "vision_cfg.patch_size as a list (oblong patches)": isinstance(vision["patch_size"], list),
            "vision_cfg.attentional_pool (CoCa's)": vision["attentional_pool"],
            "vision_cfg.final_ln_after_pool with pool_type 'avg'": vision["final_ln_after_pool"] and pool == "avg",
            f"vision_cfg.pool_type '{pool}'": pool not in THEIR_POOLS.values(),
            f"vision_cfg.pos_embed_type '{position}'": position not in ("learnable", "sin_cos_2d"),
        }
    if text["hf_model_name"]:
        strange[f"text_cfg.hf_model_name '{text['hf_model_name']}' (a text tower of transformers)"] = True
    else:
        strange |= _strange_blocks("text_cfg", text) | {
            "text_cfg.embed_cls (CoCa's)": text["embed_cls"],
            f"text_cfg.pool_type '{text['pool_type']}'": text["pool_type"] not in ("argmax", "eos", "last"),
            f"text_cfg.proj_type '{text['proj_type']}'": text["proj_type"] not in ("linear", "none"),
        }
    problems = [name for name, is_so in strange.items() if is_so]
    if problems:
        raise UserError(f"{where}: our towers have no {', no '.join(problems)}; open_clip itself can load this model")


def _strange_blocks(section: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What blocks of ours have not, of either tower."""
    names = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    kind = cfg["block_type"]
    return {f"{section}.{name}": cfg[name] for name in names} | {
        f"{section}.block_type '{kind}'": kind not in (None, "default")
    }


def image_options(vision: Mapping[str, Any], quick_gelu: bool, where: Path) -> tuple[ImageTowerConfig, tuple[int, int]]:
    """Return our options for a native image tower, and the (height, width) of its images."""
    size, patch, width = both_sides(vision["image_size"]), vision["patch_size"], vision["width"]
    if patch is None or vision["head_width"] > width:
        name = "patch_size" if patch is None else "head_width"
        raise UserError(f"{where}: vision_cfg.{name} is {vision[name]!r}, which no tower of width {width} can have")
    config = ImageTowerConfig(
        image_size=whole_patches(size, patch)[0],
        num_heads=width // vision["head_width"],
        pool="class" if vision["pool_type"] == "tok" else "average",
        class_token=True,
        pre_norm=not vision["no_ln_pre"],
        patch_bias=False,
        projection=True,
        **{ours: vision[theirs] for theirs, ours in IMAGE_NUMBERS.items()},
        **_block_options("vision_cfg", vision, quick_gelu, where),
    )
    return config, size


def _block_options(section: str, cfg: Mapping[str, Any], quick_gelu: bool, where: Path) -> dict[str, Any]:
    """Our options of the blocks of either tower; UserError for an activation or a LayerNorm that ours have not."""
    act_kwargs, norm_kwargs = cfg["act_kwargs"] or {}, cfg["norm_kwargs"] or {}
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    if act_kwargs == {"approximate": "tanh"} and not quick_gelu:
        activation = "gelu_tanh"
    elif act_kwargs and (quick_gelu or act_kwargs != {"approximate": "none"}):
        with_quick = " with quick_gelu" if quick_gelu else ""
        raise UserError(f"{where}: {section}.act_kwargs {act_kwargs}{with_quick} is no activation of ours")
    eps = norm_kwargs.get("eps", 1e-5)
    if norm_kwargs.keys() - {"eps"} or not isinstance(eps, float):
        raise UserError(f"{where}: {section}.norm_kwargs {norm_kwargs}: our LayerNorm has eps alone, a number")
    return {"activation": activation, "norm_eps": eps, "mlp_dim": int(cfg["width"] * cfg["mlp_ratio"])}


def model_options(
    model: Mapping[str, Any], image: ImageTowerConfig, text: Mapping[str, Any], where: Path
) -> ModelConfig:
    """Return our options of the whole; open_clip holds the initial scale as a logarithm."""
    scale = model["init_logit_scale"]  # a logarithm, whose last digits are not exact
    return ModelConfig(
        embed_dim=model["embed_dim"],
        image=image,
        text=_text_options(text, model["text_cfg"] or {}, model["quick_gelu"], where),
        init="clip" if model["init_logit_bias"] is None else "siglip",
        init_logit_scale=None if scale is None else round(math.exp(scale), 9),
        init_logit_bias=None if model["init_logit_bias"] is None else float(model["init_logit_bias"]),
    )


def _text_options(text: Mapping[str, Any], given: Mapping[str, Any], quick_gelu: bool, where: Path) -> TextTowerConfig:
    """Return our options for a text tower; `given` is what the file itself says, without open_clip's defaults.

    Pooling at the highest id of a text ('argmax') is pooling at its end-of-text token exactly where that is the
    highest id that texts have: 49,407 of CLIP's tokenizer, else the last of the vocabulary.
    """
    vocabulary = range(text["vocab_size"])
    clip = not text["hf_tokenizer_name"] and text["vocab_size"] >= CLIP_VOCABULARY
    eos_id, pad_id = given.get("eos_id"), given.get("pad_id", CLIP_PAD_ID if clip else None)
    if text["pool_type"] == "argmax":
        eos_id = CLIP_EOS_ID if clip else vocabulary[-1]
    elif text["pool_type"] == "eos":
        eos_id = text["eos_id"]
    else:
        eos_id = eos_id if eos_id in vocabulary else None  # nothing reads it
    return TextTowerConfig(
        causal=not text["no_causal_mask"],
        pool="last" if text["pool_type"] == "last" else "eos",
        projection=text["proj_type"] != "none",
        projection_bias=text["proj_bias"],
        eos_id=eos_id,
        pad_id=pad_id if pad_id in vocabulary else None,  # nothing reads it, whatever the pooling
        **{ours: text[theirs] for theirs, ours in TEXT_NUMBERS.items()},
        **_block_options("text_cfg", text, quick_gelu, where),
    )


def is_native(image: ImageTowerConfig, text: TextTowerConfig) -> bool:
    """Whether open_clip's own image tower can be this one; `quick_gelu` is one switch for both towers."""
    shape = image.class_token and image.projection and not image.patch_bias and image.pool in THEIR_POOLS
    return shape and (image.activation == "quick_gelu") == (text.activation == "quick_gelu")


def write_native_image(image: ImageTowerConfig, size: tuple[int, int]) -> dict:
    """Return vision_cfg of a native tower of (height, width) pixels."""
    return {
        "image_size": size_option(size),
        **{theirs: getattr(image, ours) for theirs, ours in IMAGE_NUMBERS.items()},
        "head_width": image.width // image.num_heads,
        "pool_type": THEIR_POOLS[image.pool],
        "no_ln_pre": not image.pre_norm,
        **_write_block(image),
    }


def write_model(config: ModelConfig, native: bool, vision_cfg: dict, tokenizer_cfg: dict) -> dict:
    """Return model_cfg of a model whose texts are not pooled by the mean; `tokenizer_cfg` goes into its text_cfg."""
    text, options = config.text, {}
    if config.init_logit_scale is not None:
        options["init_logit_scale"] = math.log(config.init_logit_scale)
    if config.init_logit_bias is not None:
        options["init_logit_bias"] = config.init_logit_bias
    text_cfg = {
        **{theirs: getattr(text, ours) for theirs, ours in TEXT_NUMBERS.items()},
        "no_causal_mask": not text.causal,
        "pool_type": "last" if text.pool == "last" else "argmax" if text.eos_id == text.vocab_size - 1 else "eos",
        "proj_type": "linear" if text.projection else "none",
        "proj_bias": text.projection and text.projection_bias,
        **{name: getattr(text, name) for name in ("eos_id", "pad_id") if getattr(text, name) is not None},
        **_write_block(text),
    }
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        **options,
        "custom_text": not native,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg | tokenizer_cfg,
    }


def _write_block(config: ImageTowerConfig | TextTowerConfig) -> dict:
    options = {"mlp_ratio": mlp_ratio(config.width, config.mlp_dim)}
    if config.norm_eps != 1e-5:
        options["norm_kwargs"] = {"eps": config.norm_eps}
    if config.activation == "gelu_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    return options
