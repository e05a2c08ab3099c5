"""An ONNX folder: what somebody needs who has onnxruntime and nothing else.

image_tower.onnx, text_tower.onnx            float32, the towers that the model has
image_tower_fp16.onnx, text_tower_fp16.onnx  the same with weights and arithmetic in float16: half the size
config.json                                  preprocessing, logit scale and bias, context length, class names
tokenizer.json                               pads and cuts to the context length by itself
example.py                                   all of it at work, with numpy, pillow, tokenizers and onnxruntime

Both precisions take float32 pixels (B, 3, H, W) and int64 ids (B, N) and give float32 embeddings of unit length, so
that one can stand for the other. Any batch size; the image size is fixed.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contrastive.data.tokenizer import TransformersTokenizer
from contrastive.files import write_json
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats.onnx import example
from contrastive.interop.formats.onnx.graphs import (
    PIXELS,
    TOKENS,
    ImageGraph,
    TextGraph,
    check_packages,
    write_graph,
)
from contrastive.interop.formats.outputs import Outputs
from contrastive.interop.formats.tokenizer_files import write_tokenizer
from contrastive.models import DualEncoder

FORMAT = "contrastive-onnx-1"
PRECISIONS = {"": torch.float32, "_fp16": torch.float16}
EXAMPLE_FILE = "example.py"


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write the model into the existing, empty `folder`. Every model of ours can be expressed.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_packages()
    notes = []
    for suffix, dtype in PRECISIONS.items():
        if bundle.preprocess is not None:
            pixels = torch.zeros(2, 3, *input_size(bundle))
            write_graph(ImageGraph(bundle.model, dtype), PIXELS, pixels, folder / f"image_tower{suffix}.onnx")
        if bundle.tokenizer is not None:
            text = bundle.config.text
            tokens = torch.full((2, text.context_length), text.eos_id or 0)
            write_graph(TextGraph(bundle.model, dtype), TOKENS, tokens, folder / f"text_tower{suffix}.onnx")
    write_json(folder / "config.json", describe(bundle))
    if isinstance(bundle.tokenizer, Absent):
        notes.append("no tokenizer.json: the source has no tokenizer, so texts have to come as ids")
    elif bundle.tokenizer is not None:
        notes += _write_tokenizer(bundle, folder)
    if isinstance(bundle.preprocess, Absent):
        notes.append("config.json says nothing of preprocessing: the source does not")
    (folder / EXAMPLE_FILE).write_text(Path(example.__file__).read_text())
    return notes


def input_size(bundle: Bundle) -> tuple[int, int]:
    """Height and width of the pixels that the image graph takes."""
    if isinstance(bundle.preprocess, Absent):
        return bundle.model.image_tower.input_size
    return bundle.preprocess.config.size


def describe(bundle: Bundle) -> dict:
    """What config.json holds: all that is not in the graphs."""
    model, preprocess = bundle.model, None
    if bundle.preprocess is not None and not isinstance(bundle.preprocess, Absent):
        options = bundle.preprocess.config
        preprocess = {
            "size": list(options.size),
            "resize": options.resize,
            "short_side": options.short_side or (min(options.size) if options.resize == "crop" else None),
            "cut": options.cut,
            "interpolation": options.interpolation,
            "mean": list(options.mean),
            "std": list(options.std),
        }
    description = {"format": FORMAT, "embed_dim": bundle.config.embed_dim, "preprocess": preprocess}
    if bundle.tokenizer is not None:
        description["context_length"] = bundle.config.text.context_length
    if isinstance(model, DualEncoder):
        description["logit_scale"] = model.logit_scale.exp().item()
        description["logit_bias"] = 0.0 if model.logit_bias is None else model.logit_bias.item()
    if bundle.tokenizer is None:
        description["class_names"] = bundle.class_names and list(bundle.class_names)
    return description


def outputs(
    folder: Path, images: list[Image.Image], texts: list[str], pixels: torch.Tensor, tokens: torch.Tensor | None
) -> Outputs:
    """What onnxruntime says of the float32 graphs; pixels and ids as example.py makes them."""
    own_pixels = own_tokens = None
    config = json.loads((folder / "config.json").read_text())
    if config["preprocess"] is not None:
        own_pixels = torch.from_numpy(np.stack([example.preprocess(image, config["preprocess"]) for image in images]))
    if (folder / "tokenizer.json").exists():
        own_tokens = torch.from_numpy(example.tokenize(texts, folder))
    return _computed(folder, "", config, pixels, tokens, own_pixels, own_tokens)


def half_outputs(
    folder: Path, images: list[Image.Image], texts: list[str], pixels: torch.Tensor, tokens: torch.Tensor | None
) -> Outputs:
    """What onnxruntime says of the float16 graphs."""
    return _computed(folder, "_fp16", json.loads((folder / "config.json").read_text()), pixels, tokens, None, None)


def _computed(folder, suffix, config, pixels, tokens, own_pixels, own_tokens) -> Outputs:
    image = text = logits = None
    if pixels is not None:
        image, *scores = _in_parts(folder / f"image_tower{suffix}.onnx", PIXELS, pixels)
        logits = scores[0] if scores else None
    if tokens is not None:
        text = _in_parts(folder / f"text_tower{suffix}.onnx", TOKENS, tokens)[0]
    if image is not None and text is not None:
        logits = config["logit_scale"] * image @ text.T + config["logit_bias"]
    return Outputs(image, text, logits, own_pixels, own_tokens)


def _in_parts(graph: Path, name: str, values: torch.Tensor) -> list[torch.Tensor]:
    """The outputs for the first sample alone, then for the others together: other batch sizes than the traced one."""
    session = example.open_graph(graph)
    parts = [session.run(None, {name: part.numpy()}) for part in (values[:1], values[1:])]
    return [torch.from_numpy(np.concatenate(output)) for output in zip(*parts, strict=True)]


def _write_tokenizer(bundle: Bundle, folder: Path) -> list[str]:
    notes = write_tokenizer(bundle.tokenizer, folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        notes.append("no tokenizer.json: this tokenizer is not one of the tokenizers library; use transformers for it")
    elif isinstance(bundle.tokenizer, TransformersTokenizer):  # keeps its length outside of this file
        from tokenizers import Tokenizer

        core, tokenizer = Tokenizer.from_file(str(file)), bundle.tokenizer
        pad = core.id_to_token(tokenizer.pad_id)
        core.enable_truncation(tokenizer.context_length)
        core.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad, length=tokenizer.context_length)
        core.save(str(file))
    return notes
