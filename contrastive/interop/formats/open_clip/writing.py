"""A dual encoder as a folder of open_clip: open_clip_config.json, safetensors and the tokenizer's files.

A tower as CLIP's becomes open_clip's own ViT. Any other, SigLIP's above all, becomes a ViT of timm, under its name in
timm's registry where it has one. Where it has none, a config.json of timm describes it, and the name is the place of
that file: `local-dir:FOLDER`, or `hf-hub:ORGANISATION/NAME`. Such a place is absolute, so a folder that is moved has
to be told where it lies: `retarget`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Bundle
from contrastive.interop.formats.key_table import to_theirs
from contrastive.interop.formats.open_clip.config import (
    is_native,
    text_problems,
    write_model,
    write_native_image,
    write_text,
)
from contrastive.interop.formats.open_clip.keys import (
    TRUNK,
    image_table,
    scalar_table,
    text_table,
    trunk_projection,
)
from contrastive.interop.formats.open_clip.processor import processor_problems, size_option, write_processor
from contrastive.interop.formats.open_clip.reading import CONFIG, TEXT_PREFIX, WEIGHTS
from contrastive.interop.formats.open_clip.tokenizer import write_text_tokenizer
from contrastive.interop.formats.open_clip.trunk import HUB, LOCAL, SOURCES
from contrastive.interop.formats.outputs import Outputs
from contrastive.interop.formats.timm.architecture import THEIR_POOLS
from contrastive.interop.formats.timm.keys import tower_to_theirs
from contrastive.interop.formats.timm.naming import timm_name, timm_problems
from contrastive.interop.formats.timm.processor import taken_size
from contrastive.interop.formats.timm.processor import write_processor as write_timm_processor
from contrastive.interop.formats.timm.writing import (
    checked_preprocess,
    cropped,
    cut_notes,
    describe_for_timm,
    padded,
    tower_state,
)
from contrastive.models import DualEncoder

CLAMP_NOTE = "the factor on the similarities is above 100: open_clip's training clamps it to 100 at its first step"
SINCOS_NOTE = "the fixed sin-cos positions are written as learned ones of the same values"


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the model for open_clip into an existing empty folder; return notes for the user.

    Args:
        place: where the folder will lie; an image tower of timm without a name of its own is looked for there.

    Raises:
        UserError: not both towers, or options that open_clip cannot express (all are named).
    """
    model = bundle.model
    if not isinstance(model, DualEncoder):
        raise UserError(f"{bundle.path}: open_clip holds an image and a text tower; use --to timm or transformers")
    image, text = model.image_tower.config, model.config.text
    native = is_native(image, text)
    problems = text_problems(text) + ([] if native else timm_problems(image))
    preprocess = checked_preprocess(bundle)
    problems += processor_problems(preprocess, image.patch_size)
    if problems:
        raise UserError(f"{bundle.path}: open_clip cannot express {'; '.join(problems)}")
    tokenizer_cfg, notes = write_text_tokenizer(bundle.tokenizer, folder)
    if native:
        vision_cfg = write_native_image(image, taken_size(preprocess, image.patch_size))
    else:
        vision_cfg, more = _write_trunk(bundle, folder, place)
        notes += more
    model_cfg = {
        **write_model(model.config),
        "custom_text": not native,
        "vision_cfg": vision_cfg,
        "text_cfg": write_text(text) | tokenizer_cfg,
    }
    preprocess_cfg = write_processor(preprocess, image.patch_size)
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    save_file(_weights(model, native), folder / WEIGHTS[0])
    return [
        *notes,
        *([SINCOS_NOTE] if image.position == "sincos" else []),
        *cut_notes(preprocess),
        *([CLAMP_NOTE] if model.logit_scale.exp() > 100 else []),
    ]


def retarget(folder: Path, source: str | Path) -> bool:
    """Tell a folder of ours where it lies; return whether that changed it.

    Args:
        source: the folder's place, or 'hf-hub:ORGANISATION/NAME'. For the hub the tokenizer's name is set too.
    """
    source = str(source) if str(source).startswith(SOURCES) else f"{LOCAL}{Path(source).resolve()}"
    description = read_json(folder / CONFIG)
    vision, text = (dict(description["model_cfg"][name]) for name in ("vision_cfg", "text_cfg"))
    if (vision.get("timm_model_name") or "").startswith(SOURCES):
        vision["timm_model_name"] = source
    if source.startswith(HUB) and text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = source.removeprefix(HUB)
    model_cfg = {**description["model_cfg"], "vision_cfg": vision, "text_cfg": text}
    changed = model_cfg != description["model_cfg"]
    if changed:
        write_json(folder / CONFIG, {**description, "model_cfg": model_cfg})
    return changed


def _write_trunk(bundle: Bundle, folder: Path, place: Path) -> tuple[dict, list[str]]:
    """Write what timm has to know, if anything; return vision_cfg and notes for the user."""
    image, preprocess, notes = bundle.model.image_tower.config, bundle.preprocess.config, []
    size = taken_size(preprocess, image.patch_size)
    name, arguments = timm_name(image, size)
    if arguments:  # no name of the registry alone
        processor = write_timm_processor(preprocess, image.patch_size)
        write_json(folder / "config.json", describe_for_timm(name, arguments, 0, processor))
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
        "image_size": size_option(size),
        "patch_dropout": image.patch_dropout,
    }
    return options, notes


def _weights(model: DualEncoder, native: bool) -> dict[str, torch.Tensor]:
    image, text = model.image_tower.config, model.config.text
    state = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    state |= tower_state(model.image_tower)  # with fixed positions too
    table = text_table(text, "" if native else TEXT_PREFIX) + scalar_table(model.logit_bias is not None)
    if native:
        return to_theirs(table + image_table(image), state)
    table += [trunk_projection()] if image.projection else []
    return to_theirs(table, state) | tower_to_theirs(state, image, TRUNK)


def outputs(
    folder: Path, images: list[Image.Image], texts: list[str], pixels: torch.Tensor, tokens: torch.Tensor | None
) -> Outputs:
    """What open_clip makes of the folder, wherever the folder believes that it lies."""
    import open_clip

    with _lying_in(folder):
        model, _, transform = open_clip.create_model_and_transforms(f"{LOCAL}{folder}")
        named = read_json(folder / CONFIG)["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        tokenizer = None
        if not named or (folder / "tokenizer_config.json").exists():
            tokenizer = open_clip.get_tokenizer(f"{LOCAL}{folder}")
    model.eval()
    with torch.inference_mode():
        image = model.encode_image(padded(pixels, model.visual.image_size), normalize=True)
        text = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        logits = logits if model.logit_bias is None else logits + model.logit_bias
    return Outputs(
        image=image,
        text=text,
        logits=logits,
        pixels=cropped([transform(image) for image in images], pixels),
        tokens=None if tokenizer is None else tokenizer(texts),
    )


@contextmanager
def _lying_in(folder: Path) -> Iterator[None]:
    before = (folder / CONFIG).read_bytes()
    retarget(folder, folder)
    try:
        yield
    finally:
        (folder / CONFIG).write_bytes(before)
