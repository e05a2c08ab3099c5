"""Folders of transformers: SigLIP, SigLIP 2 and CLIP models and their towers alone.

Ours are written as SiglipModel, CLIPModel, of images of any shape Siglip2Model, or the class of a tower alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from contrastive import models
from contrastive.data.preprocess import Preprocess
from contrastive.errors import UserError, needs
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import NOT_LOADED, Bundle, build
from contrastive.interop.formats.evaluation_transform import taken_size
from contrastive.interop.formats.state_dicts import fill, read_safetensors, to_ours, to_theirs, weights_of
from contrastive.interop.formats.tokenizer_files import read_transformers_tokenizer, write_tokenizer
from contrastive.interop.formats.transformers_architecture import (
    HEAD,
    adapted,
    class_name,
    fitting_family,
    is_mean_head,
    key_table,
    plain,
    their_config,
    towers_of,
)
from contrastive.interop.formats.transformers_config import STEMS, Towers, our_config, read_description
from contrastive.interop.formats.transformers_preprocess import FILE, read_preprocess, write_preprocess
from contrastive.interop.parity import Outputs, Probe, cropped, padded
from contrastive.log import warn
from contrastive.models.encoders import unit_length
from contrastive.patches import Patches

WEIGHTS = "model.safetensors"
MODELS = {
    models.ModelConfig: models.DualEncoder,
    models.ImageModelConfig: models.ImageModel,
    models.TextModelConfig: models.TextModel,
}
GEMMA, SIGLIP2_PATCHES = "Siglip2Tokenizer", (16, 256)  # what transformers' Siglip2Processor is made for
PIPELINE_LENGTH = 64  # what transformers' zero-shot pipeline pads texts to for every SigLIP model


def recognises(folder: Path) -> bool:
    """Whether config.json names a model of transformers, whichever, or is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        content = read_json(file)
    except UserError:
        return True  # `load` says what is wrong with it
    return "model_type" in content or "architectures" in content


def load(folder: Path, with_tokenizer: bool = True) -> Bundle:
    """Load a model or a tower alone."""
    found = read_description(folder)
    file = read_safetensors(folder, (WEIGHTS,))
    if found.projected is None:
        found = replace(found, projected=any(name.endswith("_projection.weight") for name in file))
    has_image = "image" in found.towers
    weights = plain(file, None if found.whole else next(iter(found.towers)), found.patch_size if has_image else 0)
    without_pooling = has_image and found.lacks_head
    mean_head = without_pooling or is_mean_head(weights)
    if mean_head:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)}
    config = our_config(found, mean_head)
    model = build(lambda: MODELS[type(config)](config), weights, folder / WEIGHTS)
    ours, theirs = to_ours(key_table(model.state_dict(), found.family), weights, folder / WEIGHTS)
    fill(model, ours, folder / WEIGHTS, theirs)
    if without_pooling:
        warn(f"{folder} has no pooling head (vision_use_head is false): its image embedding is the mean of the patches")
    preprocess = tokenizer = None
    if has_image:
        preprocess = read_preprocess(folder, found.native_size, config.image.patch_size, config.image.native)
    if "text" in found.towers:
        tokenizer = read_transformers_tokenizer(folder, config.text) if with_tokenizer else NOT_LOADED
    return Bundle(model.eval(), preprocess, tokenizer, config, folder)


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the model, its preprocessing and its tokenizer, as far as it has them."""
    needs("the export to transformers", "transformers")
    family, towers = fitting_family(bundle.model, str(bundle.path)), towers_of(bundle.model)
    preprocess, tokenizer = bundle.preprocess or None, bundle.tokenizer or None  # one that is Absent too
    state = {name: tensor for name, tensor in weights_of(bundle.model).items() if not name.startswith("head.")}
    state, notes = adapted(state, towers, family)
    size = 0
    if "image" in towers:
        size, patch_size = towers["image"].image_size, towers["image"].patch_size
        if preprocess is not None:
            if (preprocess.config.resize == "native") != towers["image"].native:
                raise UserError(
                    f"{bundle.path}: {class_name(towers, family)} takes images "
                    f"{'of any shape as patches' if towers['image'].native else 'of one size'}, and its preprocessing "
                    f"is '{preprocess.config.resize}': give the bundle a Preprocess that goes with the tower"
                )
            processor_class = f"{STEMS[family]}Processor" if len(towers) == 2 else None
            notes += write_preprocess(preprocess.config, size, patch_size, processor_class, folder)
            size = taken_size(preprocess.config, patch_size)[0]
        else:
            fills = f"; image_size in config.json is {size}, what its patches fill"
            notes.append(
                f"{bundle.path} has no preprocessing, so {FILE} was left out{'' if family == 'siglip2' else fills}"
            )
    if tokenizer is not None:
        notes += write_tokenizer(tokenizer, folder)
    elif "text" in towers:
        notes.append(f"{bundle.path} has no tokenizer, so its files were left out")
    write_json(folder / "config.json", their_config(towers, family, bundle.model.config.embed_dim, size, tokenizer))
    save_file(to_theirs(key_table(state, family), state), folder / WEIGHTS, metadata={"format": "pt"})
    if family == "siglip2" and tokenizer is not None:
        notes += _advice_on_processors(preprocess, folder)
    return notes + _advice(bundle.model, towers, family)


def _advice_on_processors(preprocess: Preprocess | None, folder: Path) -> list[str]:
    """What the library's automatic classes do with a Siglip2 model whose files are not as Google's."""
    notes, kind = [], read_json(folder / "tokenizer_config.json")["tokenizer_class"]
    if kind != GEMMA:
        notes.append(
            "AutoTokenizer and AutoProcessor take any tokenizer beside a Siglip2 model for Gemma's: load this one by "
            f"{kind}.from_pretrained"
        )
    made = None if preprocess is None else (preprocess.config.patch_size, preprocess.config.most_patches)
    if made not in (None, SIGLIP2_PATCHES):
        notes.append(
            f"Siglip2Processor passes over the folder's patches, which AutoImageProcessor does not: call it with "
            f"patch_size={made[0]}, max_num_patches={made[1]}"
        )
    return notes


def _advice(model: torch.nn.Module, towers: Towers, family: str) -> list[str]:
    notes = []
    if isinstance(model, models.ImageClassifier):
        notes.append("only the image tower was written: transformers has no class for it with this head")
    if "text" not in towers or family == "clip":
        return notes
    notes.append(
        'the text tower reads its last position: with a bare tokenizer always ask for padding="max_length", '
        "truncation=True (the processor does so by itself)"
    )
    if len(towers) == 1:
        notes.append("AutoModel does not know SigLIP's text tower alone; load it by SiglipTextModel.from_pretrained")
    length = towers["text"].context_length
    if len(towers) == 2 and length != PIPELINE_LENGTH:
        wrong = "fails" if length < PIPELINE_LENGTH else "gives wrong scores without a word"
        notes.append(
            f"transformers' zero-shot-image-classification pipeline pads to {PIPELINE_LENGTH} tokens whatever a SigLIP "
            f"model says; with {length} it {wrong}: use the processor and the model, or train with "
            f"--model.text.context_length {PIPELINE_LENGTH}"
        )
    return notes


def outputs(folder: Path, probe: Probe) -> Outputs:
    """What transformers makes of the folder: its model of pixels and tokens, its processors of images and texts.

    Raises:
        UserError: a key of the model is missing or unknown to the library.
    """
    import transformers

    name = read_json(folder / "config.json")["architectures"][0]
    with _quiet():
        options = {"local_files_only": True, "output_loading_info": True}
        model, loaded = getattr(transformers, name).from_pretrained(str(folder), **options)
        wrong = [f"{kind} {key}" for kind, keys in loaded.items() for key in keys]
        if wrong:
            raise UserError(f"transformers' {name} does not take the weights in {folder}: {wrong[0]}")
        made, ids = _processed(folder, probe.images, probe.texts)
        given = {} if probe.tokens is None else {"input_ids": probe.tokens}
        if isinstance(probe.pixels, Patches):
            given |= probe.pixels.inputs
        elif probe.pixels is not None:
            side = getattr(model.config, "vision_config", model.config).image_size
            given["pixel_values"] = padded(probe.pixels, (side, side))
            made = None if made is None else cropped(made, probe.pixels)
        with torch.inference_mode():
            out = model.eval()(**given)
    if "logits_per_image" in out:
        return Outputs(out.image_embeds, out.text_embeds, out.logits_per_image, made, ids)
    projected = next((out[key] for key in ("image_embeds", "text_embeds") if key in out), None)
    embedding = unit_length(out.pooler_output if projected is None else projected)
    return Outputs(**{"image" if "Vision" in name else "text": embedding}, pixels=made, tokens=ids)


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


def _processed(
    folder: Path, images: list[Image.Image], texts: list[str]
) -> tuple[torch.Tensor | Patches | None, torch.Tensor | None]:
    """Pixels and ids as the folder's own processor makes them, as a user would ask for them."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    offline = {"local_files_only": True}
    has_pixels, has_ids = ((folder / name).exists() for name in (FILE, "tokenizer_config.json"))
    native = read_json(folder / "config.json")["architectures"][0].startswith(STEMS["siglip2"])
    if native and has_ids:  # of such a folder AutoTokenizer takes every tokenizer for Gemma's
        AutoTokenizer = getattr(transformers, read_json(folder / "tokenizer_config.json")["tokenizer_class"])
    if has_pixels and has_ids and not native:
        both = AutoProcessor.from_pretrained(str(folder), **offline)(text=texts, images=images, return_tensors="pt")
        return both["pixel_values"], both["input_ids"]
    pixels = ids = None
    if has_pixels:
        made = AutoImageProcessor.from_pretrained(str(folder), **offline)(images, return_tensors="pt")
        pixels = Patches(made["pixel_values"], made["spatial_shapes"]).cut() if native else made["pixel_values"]
    if has_ids:
        full = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = AutoTokenizer.from_pretrained(str(folder), **offline)(texts, **full)["input_ids"]
    return pixels, ids
