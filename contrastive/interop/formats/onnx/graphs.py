"""The towers as ONNX graphs: any batch size, float32 and int64 at the ends, weights in float32 or float16."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.models import ImageClassifier

# Has GELU and LayerNormalization as single operators; onnxruntime reads it since 1.17.
OPSET = 20
PIXELS, TOKENS, EMBEDDINGS, SCORES = "pixels", "tokens", "embeddings", "scores"


class ImageGraph(nn.Module):
    """What image_tower.onnx computes: pixels (B, 3, H, W) to unit embeddings (B, E), of a classifier scores too."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", dtype)
        self.dtype = dtype

    @property
    def output_names(self) -> list[str]:
        return [EMBEDDINGS, SCORES] if isinstance(self.model, ImageClassifier) else [EMBEDDINGS]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = pixels.to(self.dtype)
        embeddings = self.model.encode_image(pixels)  # float32: unit length is made in it
        if isinstance(self.model, ImageClassifier):
            return embeddings, self.model.scores(pixels).float()
        return (embeddings,)


class TextGraph(nn.Module):
    """What text_tower.onnx computes: ids (B, context_length) to unit embeddings (B, E)."""

    output_names = [EMBEDDINGS]

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", dtype)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode_text(tokens),)


def write_graph(graph: ImageGraph | TextGraph, input_name: str, example: torch.Tensor, file: Path) -> None:
    """Write the graph; weights beyond 2 GB go to a file beside it. `example`: one input of two samples or more."""
    with _quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=graph.output_names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        # The exporter notes where in whose source every node comes from: nobody's business, and paths of this machine.
        program.model.metadata_props.clear()
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*program.model.graph.inputs, *program.model.graph.outputs):
            value.metadata_props.clear()
        program.save(str(file))


def check_packages() -> None:
    """Raise UserError where what writes and checks ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the export to ONNX needs {error.name}, which is not installed: pip install onnx onnxscript onnxruntime"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own doing from the terminal; errors pass."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
