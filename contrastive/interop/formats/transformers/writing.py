"""Our models as folders of transformers: SiglipModel, CLIPModel, or the class of a tower alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats.key_table import to_theirs
from contrastive.interop.formats.outputs import Outputs
from contrastive.interop.formats.timm.writing import cropped, padded
from contrastive.interop.formats.tokenizer_files import write_tokenizer
from contrastive.interop.formats.transformers import processor
from contrastive.interop.formats.transformers.architecture import Parts, fitting_family, their_config
from contrastive.interop.formats.transformers.equivalents import as_clip, as_siglip
from contrastive.interop.formats.transformers.keys import key_table
from contrastive.models import ImageClassifier
from contrastive.models.dual_encoder import unit_length

PROCESSORS = {"siglip": "SiglipProcessor", "clip": "CLIPProcessor"}
PIPELINE_LENGTH = 64  # what transformers' zero-shot pipeline pads texts to for every SigLIP model


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the model, its preprocessing and its tokenizer into an existing, empty folder.

    Args:
        place: where the folder will be in the end.

    Returns:
        What a user should know, in plain sentences.

    Raises:
        UserError: the format cannot hold the model exactly; it names each option that does not fit, and the way out.
    """
    parts = _parts(bundle)
    family = fitting_family(parts, str(bundle.path))
    preprocess = (
        None if bundle.preprocess is None or isinstance(bundle.preprocess, Absent) else bundle.preprocess.config
    )
    tokenizer = None if isinstance(bundle.tokenizer, Absent) else bundle.tokenizer
    notes, size = _substitutes(parts, family), 0
    if parts.image is not None:
        patch_size = parts.image.patch_size
        size = processor.taken_size(preprocess, parts.image.image_size, patch_size)
        if preprocess is not None:
            their_class = PROCESSORS[family] if parts.part == "both" else None
            notes += processor.write_preprocess(preprocess, parts.image.image_size, patch_size, their_class, folder)
        else:
            notes.append(
                f"{bundle.path} has no preprocessing, so {processor.FILE} was left out; image_size in config.json is "
                f"{size}, what its patches fill"
            )
    if parts.text is not None:
        if tokenizer is not None:
            notes += write_tokenizer(tokenizer, folder)
        else:
            notes.append(f"{bundle.path} has no tokenizer, so its files were left out")
    write_json(folder / "config.json", their_config(parts, family, size, tokenizer))
    save_file(_weights(bundle, parts, family), folder / "model.safetensors", metadata={"format": "pt"})
    return notes + _advice(bundle, parts, family)


def _parts(bundle: Bundle) -> Parts:
    model, bias = bundle.model, getattr(bundle.model, "logit_bias", None)
    tower, text = getattr(model, "image_tower", None), getattr(model, "text_tower", None)
    return Parts(
        image=None if tower is None else tower.config,
        text=None if text is None else text.config,
        embed_dim=model.config.embed_dim,
        grid=None if tower is None else tower.grid,
        logit_bias=None if bias is None else bias.item(),
    )


def _weights(bundle: Bundle, parts: Parts, family: str) -> dict[str, torch.Tensor]:
    """The state dict by their names."""
    state = {
        name: tensor.detach().cpu().float()
        for name, tensor in bundle.model.state_dict().items()
        if not name.startswith("head.")  # a classifier's
    }
    if parts.image is not None:  # fixed positions are in no state dict
        state["image_tower.position_embedding"] = bundle.model.image_tower.position_embedding.detach().cpu().float()
    if family == "siglip" and parts.part == "both":
        state.setdefault("logit_bias", torch.zeros(()))
    elif family == "clip":
        state.pop("logit_bias", None)  # zero, or it would not fit
    state = (as_siglip if family == "siglip" else as_clip)(state, parts.image, parts.text)
    return to_theirs(key_table(state, family), state)


def _substitutes(parts: Parts, family: str) -> list[str]:
    """What of the model is written in other terms, with the same outputs."""
    image, text, notes = parts.image, parts.text, []
    if image is not None:
        if image.position == "sincos":
            notes.append("the fixed sin-cos positions are written as learned ones")
        if image.pool == "average":
            notes.append("the mean over patches is written as an attention head that attends to all alike")
        if image.patch_bias and family == "clip":
            notes.append("the bias of the patch embedding is added to the positions")
        if not image.patch_bias and family == "siglip":
            notes.append("the patch embedding, which has no bias, gets one of zero")
        if parts.part == "both" and not image.projection and family == "clip":
            notes.append("the image tower, which has no projection, gets the identity")
    if text is not None:
        if not text.projection and (family == "siglip" or parts.part == "both"):
            notes.append("the text tower, which has no projection, gets the identity")
        elif not text.projection_bias and family == "siglip":
            notes.append("the text projection, which has no bias, gets one of zero")
    if parts.part == "both" and parts.logit_bias is None and family == "siglip":
        notes.append("the logits, which have no bias, get one of zero")
    return notes


def _advice(bundle: Bundle, parts: Parts, family: str) -> list[str]:
    notes = []
    if isinstance(bundle.model, ImageClassifier):
        notes.append("only the image tower was written: transformers has no class for it with this head")
    if parts.text is None or family != "siglip":
        return notes
    notes.append(
        'the text tower reads its last position: with a bare tokenizer always ask for padding="max_length", '
        "truncation=True (the processor does so by itself)"
    )
    if parts.part == "text":
        notes.append("AutoModel does not know SigLIP's text tower alone; load it by SiglipTextModel.from_pretrained")
    length = parts.text.context_length
    if parts.part == "both" and length != PIPELINE_LENGTH:
        wrong = "fails" if length < PIPELINE_LENGTH else "gives wrong scores without a word"
        notes.append(
            f"transformers' zero-shot-image-classification pipeline pads to {PIPELINE_LENGTH} tokens whatever a SigLIP "
            f"model says; with {length} it {wrong}: use the processor and the model, or train with "
            f"--model.text.context_length {PIPELINE_LENGTH}"
        )
    return notes


def outputs(
    folder: Path, images: list[Image.Image], texts: list[str], pixels: torch.Tensor | None, tokens: torch.Tensor | None
) -> Outputs:
    """What transformers makes of the folder: its model of `pixels` and `tokens`, its processors of the rest.

    Raises:
        UserError: a key of the model is missing or unknown to the library.
    """
    import transformers

    content = read_json(folder / "config.json")
    name = content["architectures"][0]
    with _quiet():
        options = {"local_files_only": True, "output_loading_info": True}
        model, loaded = getattr(transformers, name).from_pretrained(str(folder), **options)
        wrong = [f"{kind} {key}" for kind, keys in loaded.items() for key in keys]
        if wrong:
            raise UserError(f"transformers' {name} does not take the weights in {folder}: {wrong[0]}")
        made, ids = _processed(folder, images, texts)
        model.eval()
        full = pixels
        if pixels is not None:
            side = content.get("vision_config", content)["image_size"]
            full, made = padded(pixels, (side, side)), None if made is None else cropped(list(made), pixels)
        with torch.inference_mode():
            image, text, logits = _embeddings(model, name, full, tokens)
    return Outputs(image, text, logits, made, ids)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and advice off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _embeddings(model, name: str, pixels: torch.Tensor | None, tokens: torch.Tensor | None):
    if name in ("SiglipModel", "CLIPModel"):
        out = model(pixel_values=pixels, input_ids=tokens)
        return out.image_embeds, out.text_embeds, out.logits_per_image
    given = {"pixel_values": pixels} if "Vision" in name else {"input_ids": tokens}
    out = model(**given)
    found = next((out[key] for key in ("image_embeds", "text_embeds") if key in out), None)
    embedding = unit_length(out.pooler_output if found is None else found)
    return (embedding, None, None) if "Vision" in name else (None, embedding, None)


def _processed(
    folder: Path, images: list[Image.Image], texts: list[str]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Pixels and ids as the folder's own processor makes them, as a user would ask for them."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    offline = {"local_files_only": True}
    has_pixels, has_ids = ((folder / name).exists() for name in (processor.FILE, "tokenizer_config.json"))
    if has_pixels and has_ids:
        both = AutoProcessor.from_pretrained(str(folder), **offline)(text=texts, images=images, return_tensors="pt")
        return both["pixel_values"], both["input_ids"]
    pixels = ids = None
    if has_pixels:
        pixels = AutoImageProcessor.from_pretrained(str(folder), **offline)(images, return_tensors="pt")["pixel_values"]
    if has_ids:
        full = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = AutoTokenizer.from_pretrained(str(folder), **offline)(texts, **full)["input_ids"]
    return pixels, ids
