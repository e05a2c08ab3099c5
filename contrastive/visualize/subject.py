"""What is pictured: a model with the images and texts given to it. Each thing is computed once, when asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from contrastive.data.preprocess import Preprocess
from contrastive.data.tokenizer import Tokenizer
from contrastive.models.image_tower import ImageTower
from contrastive.visualize.attention import layer_index, query_attention, reading_attention, rollout_reading
from contrastive.visualize.embeddings import random_tower
from contrastive.visualize.inputs import Inputs
from contrastive.visualize.patches import patch_embeddings
from contrastive.visualize.trace import Trace, trace

MAX_SHOWN = 12
"""Images that are looked into patch by patch; whole embeddings are of all."""


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, and what it is shown. B images, S of them shown, T texts, H heads, P patches."""

    name: str
    """Of the model, for titles."""
    model: nn.Module
    """DualEncoder, ImageClassifier or ImageModel."""
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    """None for a model without a text tower, or without its tokenizer."""
    inputs: Inputs
    layer: int | None = None
    """The block whose attention is shown; None: the last, or SigLIP's attention head where there is one."""
    query: tuple[int, int] | None = None
    """(row, column) of the patch whose attention is shown; None: the middle one."""

    def check(self) -> None:
        """Raise UserError for a layer or a patch that the tower has not, before anything is computed."""
        layer_index(self.tower, self.block)
        query_attention(self.tower, self._traced(0), self.patch, self.block)

    @property
    def tower(self) -> ImageTower:
        return self.model.image_tower

    @property
    def block(self) -> int:
        """The block that is looked into, from 0."""
        return layer_index(self.tower, -1 if self.layer is None else self.layer)

    @property
    def num_shown(self) -> int:
        """S: the first images, MAX_SHOWN at most."""
        return min(len(self.inputs.images), MAX_SHOWN)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.inputs.images.shape[-2:]
        return height // self.tower.config.patch_size, width // self.tower.config.patch_size

    @property
    def patch(self) -> tuple[int, int]:
        """(row, column) of the patch whose attention is shown."""
        return self.query or (self.grid[0] // 2, self.grid[1] // 2)

    @cached_property
    def pixels(self) -> torch.Tensor:
        """(B, 3, H, W) normalised, on the model's device."""
        return self.preprocess.normalize(self.inputs.images.to(self.tower.patch_embed.weight.device))

    @cached_property
    def reading(self) -> torch.Tensor:
        """(S, H, rows, columns): see `reading_attention`, times the number of tokens: uniform attention has 1."""
        return self._maps(lambda seen: reading_attention(self.tower, seen, self.layer))

    @cached_property
    def queried(self) -> torch.Tensor:
        """(S, H, rows, columns): see `query_attention`, times the number of tokens."""
        return self._maps(lambda seen: query_attention(self.tower, seen, self.patch, self.block))

    @cached_property
    def rolled(self) -> torch.Tensor:
        """(S, rows, columns): see `rollout_reading`, times the number of tokens."""
        return self._maps(lambda seen: rollout_reading(self.tower, seen))

    @cached_property
    def patch_tokens(self) -> torch.Tensor:
        """(S, P, D) after the final norm."""
        return torch.cat([self._traced(number).patch_tokens for number in range(self.num_shown)])

    @cached_property
    @torch.no_grad()
    def patches(self) -> torch.Tensor:
        """(S, P, E): see `patch_embeddings`."""
        return torch.cat([patch_embeddings(self.tower, tokens[None]) for tokens in self.patch_tokens])

    @cached_property
    @torch.no_grad()
    def image_features(self) -> torch.Tensor:
        """(B, E), unit length."""
        return torch.cat([self.model.encode_image(batch) for batch in self.pixels.split(8)])

    @cached_property
    @torch.no_grad()
    def text_features(self) -> torch.Tensor:
        """(T, E), unit length."""
        return self.model.encode_text(self.tokenizer(list(self.inputs.texts)).to(self.pixels.device))

    @cached_property
    def untrained(self) -> ImageTower:
        """See `random_tower`."""
        return random_tower(self.tower, getattr(self.model.config, "init", "siglip"))

    @cached_property
    def _traces(self) -> dict[int, Trace]:
        return {}

    def _traced(self, number: int) -> Trace:
        if number not in self._traces:
            self._traces[number] = trace(self.tower, self.pixels[number : number + 1])
        return self._traces[number]

    def _maps(self, of: Callable[[Trace], torch.Tensor]) -> torch.Tensor:
        """One image after another: the weights of all heads of a large grid fill the memory."""
        maps = []
        for number in range(self.num_shown):
            seen = self._traced(number)
            maps.append(seen.on_grid(of(seen)) * seen.tokens.shape[1])
        return torch.cat(maps).cpu()
