"""SigLIP's image tower, module by module: transformers' weights in our tower, and the differences of what they compute.

    python examples/siglip_walkthrough.py
    python examples/siglip_walkthrough.py --model PATH    # a folder of SiglipVisionModel or SiglipModel, such as
                                                          # google/siglip-base-patch16-224 once it is downloaded

An image becomes a vector in five steps, and each is computed twice here, by both libraries from the same input:

1. embeddings   a convolution whose stride is its size turns each patch into a token; a position is added to each
2. attention    every token asks (query) all others (key) and takes from them (value), in several heads
3. MLP          every token by itself: up to a wider layer, GELU, and down
4. layers       x + attention(norm(x)), then + mlp(norm(x)); after the last one a final norm: `last_hidden_state`
5. head         one learned query attends to all patches and an MLP follows: one vector for the image

The table has a line for each step, and the script fails where they differ by more than rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from contrastive.config import parse
from contrastive.entry import run_script
from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.models import ImageTower, ImageTowerConfig

# What rounding may add up to, where a float32 has about seven digits: relative to the largest number of the step.
TOLERANCE = 1e-5

# Their names of a block's layers, and ours.
BLOCK = {
    "layer_norm1": "norm1",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.out_proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# The rest.
AROUND = {
    "embeddings.patch_embedding": "patch_embed",
    "post_layernorm": "norm",
    "head.attention.out_proj": "head.attention.out_proj",
    "head.layernorm": "head.norm",
    "head.mlp.fc1": "head.mlp.fc1",
    "head.mlp.fc2": "head.mlp.fc2",
}


class Step(NamedTuple):
    """One line of the table."""

    name: str
    theirs: torch.Tensor
    ours: torch.Tensor

    @property
    def difference(self) -> float:
        return (self.theirs - self.ours).abs().max().item()

    @property
    def relative(self) -> float:
        """The difference as a share of the largest number."""
        return self.difference / self.theirs.abs().max().item()


def vision_model(folder: Path | None):
    """A SiglipVisionModel of transformers: from a folder, or a small one whose weights are all random."""
    if folder is not None:
        kind = read_json(folder / "config.json").get("model_type")  # says in one line what is missing
        if kind not in ("siglip", "siglip_vision_model"):
            raise UserError(f"{folder} holds a model of type '{kind}': --model takes SiglipVisionModel or SiglipModel")
    from transformers import SiglipVisionConfig, SiglipVisionModel

    if folder is not None:
        model, told = SiglipVisionModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
        missing = [*told["missing_keys"], *told["mismatched_keys"]]
        if missing:  # the library fills them at random
            raise UserError(f"{folder} does not hold a whole SiglipVisionModel: '{missing[0]}' is missing or misshapen")
        return model.float().eval()
    config = SiglipVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6, image_size=112, patch_size=16
    )
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which otherwise start at 0 and 1
            parameter.normal_(std=0.2)
    return model


def our_tower(theirs) -> ImageTower:
    """Our image tower of the same shape, with the weights of theirs, key for key."""
    config = theirs.config
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
    tower = ImageTower(
        ImageTowerConfig(
            image_size=config.image_size - config.image_size % config.patch_size,
            patch_size=config.patch_size,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_dim=config.intermediate_size,
            activation=activations[config.hidden_act],
            norm_eps=config.layer_norm_eps,
            pool="attention",
        ),
        embed_dim=config.hidden_size,
    )
    tower.load_state_dict(renamed(theirs.state_dict(), config.num_hidden_layers))  # strict: every key, no other
    return tower.eval()


def renamed(weights: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Their state dict by our names."""
    names = dict(AROUND)
    for layer in range(depth):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.blocks.{layer}"
        names |= {f"{theirs}.{one}": f"{ours}.{other}" for one, other in BLOCK.items()}
    state = {f"{ours}.{kind}": weights[f"{name}.{kind}"] for name, ours in names.items() for kind in ("weight", "bias")}
    state["position_embedding"] = weights["embeddings.position_embedding.weight"]
    state["head.probe"] = weights["head.probe"]
    for kind in ("weight", "bias"):  # torch's MultiheadAttention keeps queries, keys and values in one matrix
        stacked = weights[f"head.attention.in_proj_{kind}"].chunk(3)
        state |= {f"head.attention.{part}_proj.{kind}": piece for part, piece in zip("qkv", stacked, strict=True)}
    return state


def steps(theirs, ours: ImageTower, pixels: torch.Tensor) -> Iterator[Step]:
    """Both towers on the same pixels (B, 3, H, W), step by step; each step begins with the same tokens."""
    side = ours.config.image_size
    x = theirs.embeddings(pixels)
    yield Step("embeddings", x, ours.embed_patches(pixels[..., :side, :side]))

    layer, block = theirs.encoder.layers[0], ours.transformer.blocks[0]
    inside = layer.layer_norm1(x)
    yield Step("layer 0: attention", layer.self_attn(inside)[0], block.attention(block.norm1(x)))
    yield Step("layer 0: MLP", layer.mlp(layer.layer_norm2(x)), block.mlp(block.norm2(x)))

    for number, (layer, block) in enumerate(zip(theirs.encoder.layers, ours.transformer.blocks, strict=True)):
        after = layer(x, attention_mask=None)
        yield Step(f"layer {number}", after, block(x))
        x = after
    tokens = theirs.post_layernorm(x)
    yield Step("post-norm", tokens, ours.norm(x))
    yield Step("pooled head", theirs.head(tokens), ours.head(tokens))

    # And the whole way, where the differences of all steps add up.
    whole = theirs(pixel_values=pixels)
    pixels = pixels[..., :side, :side]
    yield Step("last_hidden_state, all at once", whole.last_hidden_state, ours.forward_features(pixels))
    yield Step("pooler_output, all at once", whole.pooler_output, ours(pixels))


def shown(found: list[Step]) -> Table:
    table = Table(title="transformers' SiglipVisionModel and contrastive's ImageTower")
    table.add_column("step")
    for name in ("shape", "largest number", "max difference"):
        table.add_column(name, justify="right")
    for step in found:
        shape = " × ".join(map(str, step.ours.shape))
        table.add_row(step.name, shape, f"{step.theirs.abs().max().item():.3g}", f"{step.difference:.1e}")
    return table


@dataclass(frozen=True)
class WalkOptions:
    """What is compared."""

    model: Path | None = None
    """Folder of a SigLIP; none: a small one with random weights."""


def walk(options: WalkOptions, print_table: Callable[[Table], None]) -> list[Step]:
    torch.manual_seed(0)
    theirs = vision_model(options.model)
    ours = our_tower(theirs)
    pixels = torch.randn(2, 3, theirs.config.image_size, theirs.config.image_size)
    with torch.no_grad():
        found = list(steps(theirs, ours, pixels))
    print_table(shown(found))
    for step in found:
        assert step.ours.shape == step.theirs.shape, f"{step.name}: {step.ours.shape}, not {step.theirs.shape}"
        assert step.relative < TOLERANCE, f"{step.name} differs by {step.difference:.1e}"
    return found


def main(arguments: list[str]) -> None:
    walk(parse(WalkOptions, arguments, prog="siglip_walkthrough", description=__doc__), Console().print)


if __name__ == "__main__":
    run_script("siglip_walkthrough.py", main)
