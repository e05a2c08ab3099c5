"""Names of open_clip's weights and ours; its image towers that are models of timm (`timm_model_name`)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.files import check_sizes, read_json
from contrastive.interop.formats.evaluation_transform import both_sides
from contrastive.interop.formats.state_dicts import TensorNames, renamed_table, to_ours, to_theirs, weights_of
from contrastive.interop.formats.timm_vit import PROJECTION, build_on_meta, describe_vit, tower_to_ours, tower_to_theirs
from contrastive.log import warn
from contrastive.models import DualEncoder, ImageTowerConfig
from contrastive.models.transformer import MOST

TRUNK = "visual.trunk."
TEXT_PREFIX = "text."
DERIVED = ("attn_mask", "text.attn_mask")  # buffers that old files hold
# From our names to theirs, in this order: each pattern sees what those before it have made.
RENAMES = (
    (r"^text_tower\.norm", "text_tower.ln_final"),
    (r"^text_tower\.projection", "text_tower.text_projection"),
    (r"^image_tower\.norm", "visual.ln_post"),
    (r"^image_tower\.projection\.weight", "visual.proj"),
    (r"^image_tower\.", "visual."),
    (r"transformer\.blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"attention\.[qkv]_proj\.", "attn.in_proj_"),
    (r"attention\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"patch_embed", "conv1"),
    (r"pre_norm", "ln_pre"),
    (r"class_token", "class_embedding"),
    (r"position_embedding", "positional_embedding"),
)
LOCAL, HUB = "local-dir:", "hf-hub:"
PLACES = (LOCAL, HUB)
"""What a name of an image tower begins with where it is the place of timm's config.json."""


def read_weights(
    file: Mapping[str, torch.Tensor],
    model: DualEncoder,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    trunk: nn.Module | None,
    where: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the weights of a file by our names and what each is called in it; other keys stay as they are.

    Args:
        model: ours, which they are for.
        vision, text: open_clip's options of the towers.
        trunk: timm's model, on the meta device, where the image tower is one.

    Raises:
        UserError: a projection behind such a tower has a bias other than zero, which ours has not.
    """
    file = {name: tensor for name, tensor in file.items() if name not in DERIVED}
    # CustomTextCLIP's names, which open_clip also reads where the config asks for them and the file has CLIP's.
    prefix = TEXT_PREFIX if any(name.startswith(TEXT_PREFIX) for name in file) else ""
    scaled = [tower for tower, cfg in (("visual.", vision), (prefix, text)) if cfg["ls_init_value"] is not None]
    table = _table(model.state_dict(), prefix, trunk is not None, scaled, unit_axes=1)
    weights, theirs = to_ours(table, file, where)
    if trunk is not None:
        layers = {"linear": "visual.head.proj", "none": None}  # open_clip's; else timm's own
        projection = layers.get(vision["timm_proj"], f"{TRUNK}head")
        weights, more = tower_to_ours(weights, trunk, model, where, TRUNK, projection)
        theirs |= more
    return weights, theirs


def written_weights(model: DualEncoder, native: bool) -> dict[str, torch.Tensor]:
    """Return the weights by open_clip's names; `native`: with its own image tower, not one of timm."""
    state, image = weights_of(model), model.image_tower.config
    weights = to_theirs(_table(state, "" if native else TEXT_PREFIX, not native), state)
    if native:
        return weights
    if image.projection:
        weights["visual.head.proj.weight"] = state[PROJECTION].clone()
    return weights | tower_to_theirs(state, image, TRUNK)


def _table(
    names: Iterable[str], prefix: str, has_trunk: bool, scaled: Sequence[str] = (), unit_axes: int = 0
) -> list[TensorNames]:
    """The table of all but a tower of timm.

    Args:
        prefix: of the text tower: '' of open_clip's class CLIP, 'text.' of its CustomTextCLIP (`custom_text`).
        scaled: prefixes of the towers whose blocks scale what they add (LayerScale).
        unit_axes: those of the scale and the bias of the logits.
    """
    names = [name for name in names if not (has_trunk and name.startswith("image_tower."))]
    renames = [*RENAMES, (r"^text_tower\.", prefix)]
    if "text_tower.projection.bias" not in names:  # a plain matrix of theirs, else a Linear
        renames.append((r"text_projection\.weight", "text_projection"))
    scales = []
    for tower in scaled:
        block = rf"^({tower}transformer\.resblocks\.\d+\.)"
        scales.append((rf"{block}attn\.out_proj\.\w+$", r"\1ls_1.gamma"))
        scales.append((rf"{block}mlp\.c_proj\.\w+$", r"\1ls_2.gamma"))
    axes = dict.fromkeys(("logit_scale", "logit_bias"), unit_axes)
    return renamed_table(names, renames, ("visual.proj", f"{prefix}text_projection"), axes, scales)


def read_trunk(
    cfg: Mapping[str, Any], embed_dim: int, folder: Path, where: Path
) -> tuple[nn.Module, ImageTowerConfig, tuple[int, int]]:
    """Return timm's tower on the meta device, our options for it, and the (height, width) of its images: vision_cfg's.

    It is made with the calls that open_clip's TimmModel makes.

    A name that is a place ('local-dir:...', 'hf-hub:...') stands for timm's config.json beside the weights, so that
    a folder can be moved.

    Raises:
        UserError: timm cannot build it, config.json is missing, or its pooling or projection is none of ours.
    """
    name, pool, projection = cfg["timm_model_name"], cfg["timm_pool"], cfg["timm_proj"]
    if projection not in ("linear", "none", "", None):
        raise UserError(f"{where}: vision_cfg.timm_proj '{projection}' is no projection of ours; open_clip can load it")
    if pool in ("abs_attn", "rot_attn"):
        raise UserError(f"{where}: vision_cfg.timm_pool '{pool}' is no pooling of ours; open_clip can load it")
    if name.startswith(PLACES):
        if not (folder / "config.json").exists():
            raise UserError(f"{where} names its image tower '{name}', but timm's config.json is not in {folder}")
        _compare_places(name, folder, where)
        name = f"local-dir:{folder}"
    arguments = {"patch_drop_rate": cfg["patch_dropout"]} if cfg["patch_dropout"] > 0 else {}
    arguments |= _timm_arguments(cfg["timm_model_kwargs"] or {}, where)
    if projection == "linear":
        trunk = build_on_meta(name, where, **arguments)
        try:
            trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
        except AssertionError as error:
            raise UserError(f"{where}: vision_cfg.timm_pool '{pool}' does not fit '{name}': {error}") from None
    else:
        num_classes = 0 if projection else embed_dim
        trunk = build_on_meta(name, where, **arguments | {"num_classes": num_classes, "global_pool": pool})
    image, size = describe_vit(trunk, where, both_sides(cfg["image_size"]))
    if cfg["image_seq_len"] and not image.native:
        raise UserError(
            f"{where}: vision_cfg.image_seq_len {cfg['image_seq_len']} is for image towers that take any shape, and "
            f"'{cfg['timm_model_name']}' takes one size; leave it out"
        )
    return trunk, replace(image, projection=projection != "none"), size


def _timm_arguments(given: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """Return `timm_model_kwargs`, if they say what the tower is; UserError where they say what to read or run."""
    files = [name for name in given if re.search("pretrained|checkpoint|cache|cfg", name)]
    if files:
        raise UserError(
            f"{where}: vision_cfg.timm_model_kwargs has '{files[0]}', which is no option of the tower; leave it out"
        )
    check_sizes(given, where, MOST)
    return given


def _compare_places(name: str, folder: Path, where: Path) -> None:
    """Warn where a folder that is named describes another tower than the config.json beside the weights."""
    own, other = read_json(folder / "config.json"), Path(name.removeprefix(LOCAL)) / "config.json"
    if not name.startswith(LOCAL) or not other.is_file():
        return
    try:
        named = read_json(other)
    except UserError:
        return
    if any(named.get(key) != own.get(key) for key in ("architecture", "num_classes", "model_args")):
        warn(f"{where}: open_clip would take the image tower of {other}, another one; {folder / 'config.json'} is used")
