"""An ONNX folder: what somebody needs who has onnxruntime and nothing else.

image_tower.onnx, text_tower.onnx            float32, the towers that the model has
image_tower_fp16.onnx, text_tower_fp16.onnx  the same with weights and arithmetic in float16: half the size
config.json                                  preprocessing, logit scale and bias, context length, class names
tokenizer.json                               pads and cuts to the context length by itself
example.py                                   all of it at work, with numpy, pillow, tokenizers and onnxruntime

Both precisions take float32 pixels (B, 3, H, W) and int64 ids (B, N) and give float32 embeddings of unit length, so
that one can stand for the other. Any batch size; the image size is fixed. A model of images of any shape takes
pixel_values (B, N, P·P·3), patches of P pixels as Siglip2's, of any N, and spatial_shapes int64 (B, 2), their rows and
columns; what follows an image's own patches is not looked at.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from contrastive.data.tokenizer import TransformersTokenizer
from contrastive.errors import needs
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.formats import onnx_example
from contrastive.interop.formats.tokenizer_files import pad_and_cut, write_tokenizer
from contrastive.interop.parity import Outputs, Probe
from contrastive.models import DualEncoder, ImageClassifier
from contrastive.patches import Patches

FORMAT = "contrastive-onnx-1"
PRECISIONS = {"": torch.float32, "_fp16": torch.float16}
EXAMPLE_FILE = "example.py"
# Has GELU and LayerNormalization as single operators; onnxruntime reads it since 1.17.
OPSET = 20
PIXELS, TOKENS, EMBEDDINGS, SCORES = "pixels", "tokens", "embeddings", "scores"
VALUES, SHAPES = "pixel_values", "spatial_shapes"


def write(bundle: Bundle, folder: Path, place: Path) -> list[str]:
    """Write graphs and what goes with them. Every model of ours can be expressed."""
    needs("the export to ONNX", "onnx", "onnxscript", "onnxruntime")
    notes = []
    for suffix, dtype in PRECISIONS.items():
        if bundle.preprocess is not None:
            graph, example = image_graph(bundle, dtype)
            write_graph(graph, example, folder / f"image_tower{suffix}.onnx")
        if bundle.tokenizer is not None:
            text = bundle.config.text
            tokens = torch.full((2, text.context_length), text.eos_id or 0)
            write_graph(TextGraph(bundle.model, dtype), (tokens,), folder / f"text_tower{suffix}.onnx")
    write_json(folder / "config.json", description_of(bundle))
    if isinstance(bundle.tokenizer, Absent):
        notes.append("no tokenizer.json: the source has no tokenizer, so texts have to come as ids")
    elif bundle.tokenizer is not None:
        notes += _write_tokenizer(bundle, folder)
    if isinstance(bundle.preprocess, Absent):
        notes.append("config.json says nothing of preprocessing: the source does not")
    (folder / EXAMPLE_FILE).write_text(Path(onnx_example.__file__).read_text())
    return notes


def image_graph(bundle: Bundle, dtype: torch.dtype) -> tuple["ImageGraph", tuple[torch.Tensor, ...]]:
    """Return the graph of the image tower and what it takes, of two images."""
    tower = bundle.model.image_tower
    if not tower.config.native:
        size = tower.input_size if isinstance(bundle.preprocess, Absent) else bundle.preprocess.config.size
        return ImageGraph(bundle.model, dtype), (torch.zeros(2, 3, *size),)
    patches = torch.zeros(2, 6, 3 * tower.config.patch_size**2)
    return NativeGraph(bundle.model, dtype), (patches, torch.tensor([[2, 3], [1, 4]]))


def description_of(bundle: Bundle) -> dict:
    """What config.json holds: all that is not in the graphs."""
    model, preprocess = bundle.model, None
    if bundle.preprocess:
        options = bundle.preprocess.config
        short_side = options.short_side or (min(options.size) if options.resize == "crop" else None)
        preprocess = {**asdict(options.options), "size": list(options.size), "short_side": short_side}
        if options.resize == "native":
            preprocess |= {"patch_size": options.patch_size, "patches": options.most_patches}
    description = {"format": FORMAT, "embed_dim": bundle.config.embed_dim, "preprocess": preprocess}
    if bundle.tokenizer is not None:
        description["context_length"] = bundle.config.text.context_length
    if isinstance(model, DualEncoder):
        description["logit_scale"] = model.logit_scale.exp().item()
        description["logit_bias"] = 0.0 if model.logit_bias is None else model.logit_bias.item()
    if bundle.tokenizer is None:
        description["class_names"] = bundle.class_names and list(bundle.class_names)
    return description


def outputs(folder: Path, probe: Probe) -> Outputs:
    """What onnxruntime says of the float32 graphs; pixels and ids as example.py makes them."""
    found, options = _computed(folder, "", probe), read_json(folder / "config.json")["preprocess"]
    if options is not None and options["resize"] == "native":
        made = (map(torch.from_numpy, onnx_example.patches(image, options)) for image in probe.images)
        found = replace(found, pixels=Patches.batch([Patches(*one) for one in made]))
    elif options is not None:
        made = np.stack([onnx_example.preprocess(image, options) for image in probe.images])
        found = replace(found, pixels=torch.from_numpy(made))
    if (folder / "tokenizer.json").exists():
        found = replace(found, tokens=torch.from_numpy(onnx_example.tokenize(probe.texts, folder)))
    return found


def half_outputs(folder: Path, probe: Probe) -> Outputs:
    """What onnxruntime says of the float16 graphs."""
    return _computed(folder, "_fp16", probe)


def _computed(folder: Path, suffix: str, probe: Probe) -> Outputs:
    image = text = logits = None
    if probe.pixels is not None:
        image, *scores = _in_parts(folder / f"image_tower{suffix}.onnx", PIXELS, probe.pixels)
        logits = scores[0] if scores else None
    if probe.tokens is not None:
        text = _in_parts(folder / f"text_tower{suffix}.onnx", TOKENS, probe.tokens)[0]
    if image is not None and text is not None:
        config = read_json(folder / "config.json")
        logits = config["logit_scale"] * image @ text.T + config["logit_bias"]
    return Outputs(image, text, logits)


def _in_parts(graph: Path, name: str, values: torch.Tensor | Patches) -> list[torch.Tensor]:
    """The outputs for the first sample alone, then for the others together: other batch sizes than the traced one."""
    session = onnx_example.open_graph(graph)
    parts = [session.run(None, graph_inputs(name, part)) for part in (values[:1], values[1:])]
    return [torch.from_numpy(np.concatenate(output)) for output in zip(*parts, strict=True)]


def graph_inputs(name: str, values: torch.Tensor | Patches) -> dict[str, np.ndarray]:
    """Return what a graph takes, by name; images of any shape without what none of them needs."""
    if not isinstance(values, Patches):
        return {name: values.numpy()}
    values = values.cut()
    return {VALUES: values.values.numpy(), SHAPES: values.grids.numpy()}


def _write_tokenizer(bundle: Bundle, folder: Path) -> list[str]:
    notes = write_tokenizer(bundle.tokenizer, folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        notes.append("no tokenizer.json: this tokenizer is not one of the tokenizers library; use transformers for it")
    elif isinstance(bundle.tokenizer, TransformersTokenizer):  # keeps its length outside of this file
        from tokenizers import Tokenizer

        core = Tokenizer.from_file(str(file))
        pad_and_cut(core, bundle.tokenizer)
        core.save(str(file))
    return notes


class TextGraph(nn.Module):
    """What text_tower.onnx computes: ids (B, context_length) to unit embeddings (B, E)."""

    output_names = [EMBEDDINGS]
    dynamic: ClassVar = {TOKENS: {0: "batch"}}
    """Its inputs and which of their axes are of any length."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", dtype)
        self.dtype = dtype

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode_text(tokens),)


class ImageGraph(TextGraph):
    """What image_tower.onnx computes: pixels (B, 3, H, W) to unit embeddings (B, E), of a classifier scores too."""

    dynamic: ClassVar = {PIXELS: {0: "batch"}}

    @property
    def output_names(self) -> list[str]:
        return [EMBEDDINGS, SCORES] if isinstance(self.model, ImageClassifier) else [EMBEDDINGS]

    def forward(self, pixels: torch.Tensor | Patches) -> tuple[torch.Tensor, ...]:
        pixels = pixels.to(self.dtype)
        embeddings = self.model.encode_image(pixels)  # float32: unit length is made in it
        if isinstance(self.model, ImageClassifier):
            return embeddings, self.model.scores(pixels).float()
        return (embeddings,)


class NativeGraph(ImageGraph):
    """As ImageGraph, of images of any shape."""

    dynamic: ClassVar = {VALUES: {0: "batch", 1: "patches"}, SHAPES: {0: "batch"}}

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(Patches(pixel_values, spatial_shapes))


def write_graph(graph: ImageGraph | TextGraph, example: tuple[torch.Tensor, ...], file: Path) -> None:
    """Write the graph; weights beyond 2 GB go to a file beside it. `example`: inputs of two samples or more."""
    dims = {name: torch.export.Dim(name) for axes in graph.dynamic.values() for name in axes.values()}
    with _quiet():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(graph.dynamic),
            output_names=graph.output_names,
            dynamic_shapes=tuple({axis: dims[name] for axis, name in axes.items()} for axes in graph.dynamic.values()),
        )
        # The exporter notes where in whose source every node comes from: nobody's business, and paths of this machine.
        program.model.metadata_props.clear()
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*program.model.graph.inputs, *program.model.graph.outputs):
            value.metadata_props.clear()
        program.save(str(file))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own doing from the terminal; errors pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
