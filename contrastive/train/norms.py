"""How large gradients and outputs are, block by block: to see a run go wrong before its loss does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from contrastive.distributed.collectives import all_reduce_sum, world_size
from contrastive.distributed.sharding import local
from contrastive.models.transformer import Transformer


class BlockNorms:
    """Figures of a step, for each block of each transformer in `model` and each of its other parts.

    grad_norm/PART: the norm of the averaged gradient, before it is clipped. output_rms/BLOCK: the root mean square of
    what leaves the block, over all tokens of the global batch, padding included where it is computed.

    Args:
        every: steps between two that are looked at; None: none is.
    """

    def __init__(self, model: nn.Module, every: int | None):
        self.model, self.every = model, every
        self._transformers = {name: part for name, part in model.named_modules() if isinstance(part, Transformer)}

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around the passes of a step, counted from 1. Nothing is computed in one that is not due."""
        due = self.every is not None and step % self.every == 0
        for transformer in self._transformers.values():
            transformer.mean_squares = [] if due else None
        yield

    @torch.no_grad()
    def figures(self) -> dict[str, torch.Tensor]:
        """Return the figures of the step that was watched last, detached scalars equal on all ranks, which must call.

        Call it before gradients are clipped. Of a step that was not due there are none.
        """
        found = {}
        if any(transformer.mean_squares is not None for transformer in self._transformers.values()):
            found = self._gradients() | self._outputs()
        for transformer in self._transformers.values():
            transformer.mean_squares = None
        return found

    def _gradients(self) -> dict[str, torch.Tensor]:
        with_gradient = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        squares: dict[str, list[torch.Tensor]] = {}  # by part: of what this rank has of it
        norms = torch._foreach_norm([local(gradient) for _, gradient in with_gradient], dtype=torch.float32)
        for (name, gradient), norm in zip(with_gradient, norms, strict=True):
            share = 1 if isinstance(gradient, DTensor) else 1 / world_size()  # every rank has the whole
            squares.setdefault(self._part(name), []).append(share * norm.square())
        if not squares:
            return {}
        sums = all_reduce_sum(torch.stack([sum(each) for each in squares.values()])).sqrt()
        return {f"grad_norm/{part}": norm for part, norm in zip(squares, sums, strict=True)}

    def _part(self, parameter: str) -> str:
        """'image_tower.blocks.3' of what is in a block, 'image_tower.patch_embed' of other parameters."""
        for name in self._transformers:
            if parameter.startswith(f"{name}.blocks."):
                return _block(name, int(parameter.removeprefix(f"{name}.blocks.").partition(".")[0]))
        return ".".join(parameter.split(".")[:2])

    def _outputs(self) -> dict[str, torch.Tensor]:
        sums, counts = {}, []
        for name, transformer in self._transformers.items():
            if transformer.mean_squares:  # a tower that is not trained may have been left out
                means, tokens = zip(*transformer.mean_squares, strict=True)
                depth = len(transformer.blocks)
                tokens = torch.tensor(tokens, dtype=torch.float32).to(means[0].device).view(-1, depth)
                squares = (torch.stack(means).view(-1, depth) * tokens).sum(0)
                sums |= {f"output_rms/{_block(name, number)}": square for number, square in enumerate(squares)}
                counts.append(tokens.sum(0))
        if not sums:
            return {}
        whole, count = all_reduce_sum(torch.stack([torch.stack(list(sums.values())), torch.cat(counts)]))
        return dict(zip(sums, (whole / count).sqrt(), strict=True))


def _block(transformer: str, number: int) -> str:
    return f"{transformer.removesuffix('transformer')}blocks.{number}"
