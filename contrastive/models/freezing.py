"""Which part of an image trunk learns, told by block."""

from contrastive.errors import UserError
from contrastive.models.image_trunk import ImageTrunk

BLOCKS = "transformer.blocks."


def freeze(trunk: ImageTrunk, blocks: int | slice | None) -> None:
    """Stop gradients: of everything, of the first n blocks and the embeddings below them, or of a slice of blocks."""
    depth = len(trunk.transformer.blocks)
    _set_trainable(trunk, False, range(-1, _count(blocks, depth)) if isinstance(blocks, int) else blocks)


def unfreeze(trunk: ImageTrunk, blocks: int | slice | None) -> None:
    """Let gradients through: of everything, of the last n blocks and what is above them, or of a slice of blocks."""
    depth = len(trunk.transformer.blocks)
    _set_trainable(trunk, True, range(depth - _count(blocks, depth), depth + 1) if isinstance(blocks, int) else blocks)


def _set_trainable(trunk: ImageTrunk, trainable: bool, stages: range | slice | None) -> None:
    depth = len(trunk.transformer.blocks)
    if isinstance(stages, slice):
        stages = range(*stages.indices(depth))
    for name, parameter in trunk.named_parameters():
        if stages is None or _stage(name, depth) in stages:
            parameter.requires_grad_(trainable)


def _stage(name: str, depth: int) -> int:
    """-1 below the first block, its index in a block, `depth` above the last."""
    if name.startswith(BLOCKS):
        return int(name.removeprefix(BLOCKS).split(".")[0])
    return depth if name.startswith(("norm.", "head.")) else -1


def _count(blocks: int, depth: int) -> int:
    if isinstance(blocks, bool) or not 0 <= blocks <= depth:
        raise UserError(f"{blocks!r} blocks: this encoder has {depth}; give 0 to {depth}, a slice, or nothing for all")
    return blocks
