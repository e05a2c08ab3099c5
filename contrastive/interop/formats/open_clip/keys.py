"""Names of open_clip's weights and ours. Its towers of timm are in formats/timm/keys.py."""

from contrastive.interop.formats.key_table import Entry
from contrastive.models import ImageTowerConfig, TextTowerConfig

VISUAL, TRUNK, PROJECTION = "visual.", "visual.trunk.", "image_tower.projection.weight"


def image_table(config: ImageTowerConfig, layer_scale: bool = False) -> list[Entry]:
    """Return the table of a native image tower."""
    ours = "image_tower."
    table = [
        Entry(f"{VISUAL}class_embedding", (f"{ours}class_token",)),
        Entry(f"{VISUAL}positional_embedding", (f"{ours}position_embedding",)),
        Entry(f"{VISUAL}conv1.weight", (f"{ours}patch_embed.weight",)),
        Entry(f"{VISUAL}proj", (PROJECTION,), transposed=True),
    ]
    if config.pre_norm:
        table += _layer(f"{VISUAL}ln_pre", f"{ours}pre_norm")
    table += _blocks(f"{VISUAL}transformer.resblocks.", f"{ours}transformer.blocks.", config.depth, layer_scale)
    return table + _layer(f"{VISUAL}ln_post", f"{ours}norm")


def text_table(config: TextTowerConfig, prefix: str, layer_scale: bool = False) -> list[Entry]:
    """Return the table of a text tower.

    Args:
        prefix: '' of open_clip's class CLIP, 'text.' of its CustomTextCLIP (`custom_text` in the config).
    """
    ours = "text_tower."
    table = [
        Entry(f"{prefix}token_embedding.weight", (f"{ours}token_embedding.weight",)),
        Entry(f"{prefix}positional_embedding", (f"{ours}position_embedding",)),
    ]
    table += _blocks(f"{prefix}transformer.resblocks.", f"{ours}transformer.blocks.", config.depth, layer_scale)
    table += _layer(f"{prefix}ln_final", f"{ours}norm")
    if config.projection and config.projection_bias:  # a Linear of theirs, else a plain matrix
        table += _layer(f"{prefix}text_projection", f"{ours}projection")
    elif config.projection:
        table.append(Entry(f"{prefix}text_projection", (f"{ours}projection.weight",), transposed=True))
    return table


def scalar_table(bias: bool, unit_axes: int = 0) -> list[Entry]:
    """Return the table of the scale and, where there is one, the bias of the logits."""
    names = ("logit_scale", "logit_bias") if bias else ("logit_scale",)
    return [Entry(name, (name,), unit_axes=unit_axes) for name in names]


def trunk_projection() -> Entry:
    """Return the entry of the projection behind a tower of timm."""
    return Entry(f"{VISUAL}head.proj.weight", (PROJECTION,))


def _blocks(theirs: str, ours: str, depth: int, layer_scale: bool) -> list[Entry]:
    table = []
    for index in range(depth):
        block, own = f"{theirs}{index}.", f"{ours}{index}."
        scales = (f"{block}ls_1.gamma", f"{block}ls_2.gamma") if layer_scale else (None, None)
        for part in ("weight", "bias"):
            projections = tuple(f"{own}attention.{name}_proj.{part}" for name in "qkv")
            table.append(Entry(f"{block}attn.in_proj_{part}", projections))
        table += _layer(f"{block}attn.out_proj", f"{own}attention.out_proj", scales[0])
        table += _layer(f"{block}ln_1", f"{own}norm1") + _layer(f"{block}ln_2", f"{own}norm2")
        table += _layer(f"{block}mlp.c_fc", f"{own}mlp.fc1") + _layer(f"{block}mlp.c_proj", f"{own}mlp.fc2", scales[1])
    return table


def _layer(theirs: str, ours: str, scale: str | None = None) -> list[Entry]:
    return [Entry(f"{theirs}.{part}", (f"{ours}.{part}",), scale=scale) for part in ("weight", "bias")]
