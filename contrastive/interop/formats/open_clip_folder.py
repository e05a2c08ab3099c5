"""Folders of open_clip: open_clip_config.json, safetensors and the tokenizer's files.

They are read without making open_clip's model. Image towers are its own ViT or a ViT of timm (then timm is imported,
for what its name stands for), of version 4 also a NaFlexVit of timm, for images of any shape.

Written is a dual encoder. A tower as CLIP's becomes open_clip's own ViT. Any other, SigLIP's above all, becomes a ViT
of timm, under its name in timm's registry where it has one. Where it has none, a config.json of timm describes it, and
the name is the place of that file: `local-dir:FOLDER`, or `hf-hub:ORGANISATION/NAME`. Such a place is absolute, so a
folder that is moved has to be told where it lies: `retarget`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from contrastive.data.tokenizer import Tokenizer, TransformersTokenizer
from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import NOT_LOADED, Absent, Bundle, build
from contrastive.interop.formats.evaluation_transform import (
    checked_preprocess,
    notes_on_images,
    read_open_clip_transform,
    size_option,
    taken_size,
    whole_patches,
    write_open_clip_transform,
)
from contrastive.interop.formats.open_clip_config import (
    image_options,
    is_native,
    model_options,
    read_sections,
    write_model,
    write_native_image,
)
from contrastive.interop.formats.state_dicts import (
    TensorNames,
    fill,
    read_safetensors,
    renamed_table,
    to_ours,
    to_theirs,
    weights_of,
)
from contrastive.interop.formats.timm_architecture import (
    PROJECTION,
    THEIR_POOLS,
    timm_description,
    timm_problems,
    tower_to_ours,
    tower_to_theirs,
)
from contrastive.interop.formats.timm_vit import HUB, LOCAL, PLACES, read_trunk
from contrastive.interop.formats.tokenizer_files import read_open_clip_tokenizer, write_open_clip_tokenizer
from contrastive.interop.parity import Outputs, Probe, cropped, logits_of, padded
from contrastive.log import warn
from contrastive.models import DualEncoder, ModelConfig

CONFIG = "open_clip_config.json"
# In open_clip's own order; without the pickles among them.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
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
CLAMP_NOTE = "the factor on the similarities is above 100: open_clip's training clamps it to 100 at its first step"


def recognises(folder: Path) -> bool:
    """Whether this is a folder of open_clip."""
    return (folder / CONFIG).exists()


def load(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load a model of open_clip.

    LayerScale is folded into the layers before it. Fixed sin-cos positions, whose formula differs from ours, are kept
    as learned ones. A tokenizer whose files are missing, or that ours cannot be, is Absent.
    """
    where = folder / CONFIG
    description = read_json(where)
    if "model_cfg" not in description:
        raise UserError(f"{where} has no model_cfg: put the options of the model under that key")
    model_cfg, vision, text = read_sections(description["model_cfg"], where)
    trunk = None
    if vision["timm_model_name"]:
        trunk, image, size = read_trunk(vision, model_cfg["embed_dim"], folder, where)
    else:
        image, size = image_options(vision, model_cfg["quick_gelu"], where)
    config = model_options(model_cfg, image, text, where)
    try:
        image.check(), config.text.check()
        file_weights = read_safetensors(folder, WEIGHTS)
        model = build(lambda: DualEncoder(config), file_weights, folder)
    except UserError as error:  # sizes that do not go together
        raise UserError(f"{where}: {error}") from None
    model.image_tower.set_input_size(whole_patches(size, image.patch_size))
    weights, theirs = _read_weights(file_weights, model, vision, text, trunk, folder)
    fill(model, weights, folder, theirs)
    return Bundle(
        model=model.eval(),
        preprocess=read_open_clip_transform(description.get("preprocess_cfg") or {}, vision, image, size, where),
        tokenizer=_tokenizer(text, config, folder) if with_tokenizer else NOT_LOADED,
        config=config,
        path=folder,
    )


def _tokenizer(text: Mapping[str, Any], config: ModelConfig, folder: Path) -> Tokenizer | Absent:
    tokenizer = read_open_clip_tokenizer(text, folder)
    if text["pool_type"] != "argmax":
        return tokenizer
    if isinstance(tokenizer, TransformersTokenizer) and tokenizer.eos_id != config.text.eos_id:
        raise UserError(
            f"{folder / CONFIG}: pool_type 'argmax' takes the token of the highest id, which is {config.text.eos_id}, "
            f"but texts of its tokenizer end with {tokenizer.eos_id}; set text_cfg.pool_type to 'eos' and eos_id to "
            f"{tokenizer.eos_id} if the model was trained so"
        )
    if isinstance(tokenizer, Absent) and text["hf_tokenizer_name"]:
        warn(f"{folder}: pool_type 'argmax' is taken as: each text ends with id {config.text.eos_id}")
    return tokenizer


def _read_weights(
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


def _written_weights(model: DualEncoder, native: bool) -> dict[str, torch.Tensor]:
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


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write a dual encoder; open_clip looks in `place` for an image tower of timm without a name of its own."""
    model = bundle.model
    if not isinstance(model, DualEncoder):
        raise UserError(f"{bundle.path}: open_clip holds an image and a text tower; use --to timm or transformers")
    image, text = model.image_tower.config, model.config.text
    native = is_native(image, text)
    problems = [] if native else timm_problems(image)
    if image.native:
        problems.append(
            "model.image.native true (images of any shape; --to transformers holds it, --to timm its image tower)"
        )
    if text.pool == "average":
        problems.append("model.text.pool 'average' (its text towers pool at one token; train with 'eos' or 'last')")
    if not text.attend_padding:
        problems.append("model.text.attend_padding false (its bidirectional text towers attend to padding)")
    preprocess, unlike = checked_preprocess(bundle, scales=False)
    problems += unlike
    if problems:
        raise UserError(f"{bundle.path}: open_clip cannot express {'; '.join(problems)}")
    tokenizer_cfg, notes = write_open_clip_tokenizer(bundle.tokenizer, folder)
    if native:
        vision_cfg = write_native_image(image, taken_size(preprocess, image.patch_size))
    else:
        vision_cfg, more = _write_trunk(bundle, folder, place)
        notes += more
    model_cfg = write_model(model.config, native, vision_cfg, tokenizer_cfg)
    preprocess_cfg = write_open_clip_transform(preprocess, image.patch_size)
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    save_file(_written_weights(model, native), folder / WEIGHTS[0])
    return notes + notes_on_images(image, preprocess) + [CLAMP_NOTE] * bool(model.logit_scale.exp() > 100)


def retarget(folder: Path, source: str | Path) -> bool:
    """Tell a folder of ours where it lies; return whether that changed it.

    Args:
        source: the folder's place, or 'hf-hub:ORGANISATION/NAME'. For the hub the tokenizer's name is set too.
    """
    source = str(source) if str(source).startswith(PLACES) else f"{LOCAL}{Path(source).resolve()}"
    description = read_json(folder / CONFIG)
    vision, text = (description["model_cfg"][name] for name in ("vision_cfg", "text_cfg"))
    if (vision.get("timm_model_name") or "").startswith(PLACES):
        vision["timm_model_name"] = source
    if source.startswith(HUB) and text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = source.removeprefix(HUB)
    changed = description != read_json(folder / CONFIG)
    if changed:
        write_json(folder / CONFIG, description)
    return changed


def _write_trunk(bundle: Bundle, folder: Path, place: Path) -> tuple[dict, list[str]]:
    """Write what timm has to know, if anything; return vision_cfg and notes for the user."""
    image, preprocess, notes = bundle.model.image_tower.config, bundle.preprocess.config, []
    description = timm_description(image, preprocess)
    name = description["architecture"]
    if description["model_args"]:  # no name of the registry alone
        write_json(folder / "config.json", description)
        name = f"{LOCAL}{place.resolve()}"
        notes.append(
            f"timm has no name for this image tower: its config.json is looked for in {place}. After moving the "
            f"folder, set model_cfg.vision_cfg.timm_model_name in {CONFIG} to '{LOCAL}NEW_PLACE' "
            f"('{HUB}ORGANISATION/NAME' on the hub)"
        )
    options = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": THEIR_POOLS[image.pool],
        "timm_proj": "linear" if image.projection else "none",
        "image_size": size_option(taken_size(preprocess, image.patch_size)),
        "patch_dropout": image.patch_dropout,
    }
    return options, notes


def outputs(folder: Path, probe: Probe) -> Outputs:
    """What open_clip makes of the folder, wherever the folder believes that it lies."""
    import open_clip

    before, tokenizer = (folder / CONFIG).read_bytes(), None
    retarget(folder, folder)
    try:
        model, _, transform = open_clip.create_model_and_transforms(f"{LOCAL}{folder}")
        named = read_json(folder / CONFIG)["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        if not named or (folder / "tokenizer_config.json").exists():
            tokenizer = open_clip.get_tokenizer(f"{LOCAL}{folder}")
    finally:
        (folder / CONFIG).write_bytes(before)
    model.eval()
    with torch.inference_mode():
        image = model.encode_image(padded(probe.pixels, model.visual.image_size), normalize=True)
        text = model.encode_text(probe.tokens, normalize=True)
        logits = logits_of(model, image, text)
    return Outputs(
        image=image,
        text=text,
        logits=logits,
        pixels=cropped([transform(image) for image in probe.images], probe.pixels),
        tokens=None if tokenizer is None else tokenizer(probe.texts),
    )
