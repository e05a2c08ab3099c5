"""The image tower as an encoder for vision-language models: the tokens of a chosen layer, and nothing that is unused.

tokens = encoder(pixels)               # (B, N, D): patch tokens, the class token left out
grid = encoder(pixels, fmt="NCHW")     # (B, D, h, w)
ragged = encoder(patches, fmt="packed")  # of images of any shape (T, D), one behind the other, with their grids
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.models.image_encoder_config import (
    ACTIVATION_NAMES,
    ImageEncoderConfig,
    RaggedTokens,
    check_pool,
    hidden_state_numbers,
    one_grid,
    ragged,
)
from contrastive.models.image_tower import ImageTower, ImageTrunk
from contrastive.models.transformer import AttentionPooling
from contrastive.patches import Patches
from contrastive.words import no_attribute

Output = torch.Tensor | RaggedTokens


class ImageEncoder(ImageTrunk):
    """A copy of a tower up to the wanted layer.

    Blocks above it, and a final norm and a pooling head that are not asked for, are not in the module: nothing runs
    in vain, and under DDP no parameter goes without a gradient. It has no dropout of any kind, so train() and eval()
    give the same output. Its parameters have the tower's names.

    Args:
        tower: where architecture and weights come from. They are copied.
        layer: which hidden state, counted as transformers and LLaVA count `hidden_states`: 0 is the input of the
            first block (after positions and pre_norm), k the output of block k, -1 that of the last block, -2 that of
            the last but one. Several: the output is a tuple in their order. timm's `get_intermediate_layers` counts
            blocks from 0: its index i is layer i + 1 here.
        norm: apply the tower's final LayerNorm, to whichever layer.
        pool: None gives tokens; 'class', 'average' (over patches) or 'attention' (the tower's head) a vector per
            image, 'tower' what the tower itself does. `layer=-1, norm=True, pool='tower'` are the tower's own
            features before its projection.
        keep_prefix: leave the class token before the patches (LLaVA's 'cls_patch').
        preprocess: kept at hand as `preprocess` and `image_processor`; with a method `with_size((height, width))`.

    Raises:
        UserError: no such layer, or a pooling or a prefix that the tower has not.
    """

    def __init__(
        self,
        tower: ImageTower,
        layer: int | Iterable[int] = -2,
        norm: bool = False,
        pool: str | None = None,
        *,
        keep_prefix: bool = False,
        preprocess: Any = None,
    ):
        options = tower.architecture
        layer = tuple(layer) if isinstance(layer, Iterable) and not isinstance(layer, str) else layer
        numbers = hidden_state_numbers(layer if isinstance(layer, tuple) else (layer,), options.depth)
        pool = check_pool(pool, options)
        if keep_prefix and (pool is not None or not options.class_token):
            reason = "pooled features have no tokens" if pool is not None else "this tower has no class token"
            raise UserError(f"keep_prefix has nothing to keep: {reason}; leave it out")
        kept = replace(options, depth=max(numbers), dropout=0.0, patch_dropout=0.0)
        with torch.device("meta"):  # no weights are drawn: they are the tower's
            super().__init__(kept)
            self.norm = nn.LayerNorm(kept.width, eps=kept.norm_eps) if norm else None
            if pool == "attention":
                self.head = AttentionPooling(kept)
        self._take(tower)
        self.layer, self.numbers = layer, numbers
        self.pool, self.keep_prefix, self.tower_depth = pool, keep_prefix, options.depth
        self.preprocess = preprocess
        self.train(tower.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise no_attribute("encoder", self, name) from None

    def _take(self, tower: ImageTower) -> None:
        self.patch_embed.grid_size = tower.grid
        positions = tower.position_embedding.detach().clone()
        learned = self.architecture.position == "learned"
        self.position_embedding = nn.Parameter(positions) if learned else positions
        theirs = tower.state_dict()
        self.load_state_dict({name: theirs[name].clone() for name in self.state_dict()}, assign=True)

    def forward(
        self, pixels: torch.Tensor | Patches, fmt: Literal["NLC", "NCHW", "packed"] = "NLC"
    ) -> Output | tuple[Output, ...]:
        """Encode preprocessed images, (B, 3, H, W) float of any size in whole patches; of a native tower Patches too.

        Returns:
            (B, N, D) patch tokens, row by row; of Patches N is the most of an image, and 0 follows those of the others
            (`Patches.cut().mask` tells which). (B, D, h, w) with fmt='NCHW', RaggedTokens with fmt='packed'; (B, D)
            where the encoder pools. A tuple of these where several layers were asked for. In the encoder's dtype.

        Raises:
            UserError: what is no batch of either kind; 'NCHW' of images whose grids differ.
        """
        if fmt not in ("NLC", "NCHW", "packed"):
            raise UserError(f"fmt is {fmt!r}; use 'NLC' for (B, N, D), 'NCHW' for (B, D, h, w) or 'packed' for (T, D)")
        if fmt != "NLC" and (self.pool is not None or self.keep_prefix):
            raise UserError(f"fmt {fmt!r} is for patch tokens alone: load the encoder without pool and keep_prefix")
        states = self._checked_states(pixels, self.numbers)
        outputs = tuple(self._output(states[number], fmt, pixels) for number in self.numbers)
        return outputs if isinstance(self.layer, tuple) else outputs[0]

    def _output(self, x: torch.Tensor, fmt: str, pixels: torch.Tensor | Patches) -> Output:
        if self.norm is not None:
            x = self._normed(x, pixels)
        if self.pool is not None:
            return self.pool_tokens(x, self.pool, pixels)
        if not self.keep_prefix:
            x = x[:, self.num_prefix_tokens :]
        if fmt == "packed":
            images = pixels if isinstance(pixels, Patches) else Patches.of(pixels, self.patch_size)
            return ragged(x, images.grids)
        return self._as_grid(x, pixels) if fmt == "NCHW" else x

    def _as_grid(self, x: torch.Tensor, pixels: torch.Tensor | Patches) -> torch.Tensor:
        if isinstance(pixels, Patches):
            rows, columns = one_grid(pixels)
        else:
            rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        return x.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()

    def _normed(self, x: torch.Tensor, pixels: torch.Tensor | Patches) -> torch.Tensor:
        return self._unpacked(self.norm(x), pixels, None)  # the norm has a bias: padding is to be 0 again

    def _checked_states(self, pixels: torch.Tensor | Patches, numbers: Iterable[int]) -> dict[int, torch.Tensor]:
        values = pixels.values if isinstance(pixels, Patches) else pixels
        if not isinstance(values, torch.Tensor):
            kind = type(pixels).__name__
            raise UserError(f"pixels are a {kind}, not a tensor (B, 3, H, W); encoder.preprocess makes (3, H, W)")
        if values is pixels and (pixels.ndim != 4 or pixels.shape[1] != 3):
            raise UserError(f"pixels are {tuple(pixels.shape)}, not (B, 3, H, W); encoder.preprocess makes (3, H, W)")
        if not values.is_floating_point():
            raise UserError(f"pixels are {values.dtype}, not normalised floats; encoder.preprocess makes them")
        return self.states(pixels.to(self.dtype), frozenset(numbers))

    def hidden_states(self, pixels: torch.Tensor | Patches) -> tuple[torch.Tensor, ...]:
        """All `num_hidden_layers` + 1 hidden states, (B, N, D) each, class token included, as transformers gives them.

        Raises:
            UserError: an encoder that ends below the tower's last block, where [-2] would be another layer.
        """
        self._check_whole("hidden_states")
        depth = len(self.blocks)
        states = self._checked_states(pixels, range(depth + 1))
        return tuple(states[number] for number in range(depth + 1))

    def get_intermediate_layers(
        self,
        x: torch.Tensor | Patches,
        n: int | Iterable[int] = 1,
        reshape: bool = False,
        *,
        return_prefix_tokens: bool = False,
        return_class_token: bool = False,
        norm: bool = False,
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], ...]:
        """Outputs of blocks as timm and DINO give them: blocks count from 0, a number n means the last n.

        The flags after `reshape`, whose order differs between the two, go by name; timm's default is norm=False, DINO's
        norm=True.

        Returns:
            Per block, in the order of the blocks, (B, N, D) patch tokens, (B, D, h, w) with `reshape`. Pairs of these
            and (B, P, D) prefix tokens with `return_prefix_tokens` (P is 0 without a class token), or the class token
            (B, D) with `return_class_token`.

        Raises:
            UserError: no such block, or an encoder that ends below the tower's last one, where counting would go wrong.
        """
        self._check_whole("get_intermediate_layers")
        if norm and self.norm is None:
            raise UserError("this encoder was made without the final norm: load it with norm=True")
        if return_class_token and not self.num_prefix_tokens:
            raise UserError("this encoder has no class token: leave return_class_token out")
        numbers = self._block_numbers(n)
        states = self._checked_states(x, numbers)
        outputs = []
        for number in numbers:
            state = self._normed(states[number], x) if norm else states[number]
            prefix, patches = state.tensor_split([self.num_prefix_tokens], dim=1)
            patches = self._as_grid(patches, x) if reshape else patches
            if return_class_token:
                outputs.append((patches, prefix[:, 0]))
            else:
                outputs.append((patches, prefix) if return_prefix_tokens else patches)
        return tuple(outputs)

    def _check_whole(self, method: str) -> None:
        if len(self.blocks) < self.tower_depth:
            raise UserError(
                f"{method} counts the layers of a whole tower, and this encoder ends at block {len(self.blocks)} of "
                f"{self.tower_depth}: load it with layer=-1"
            )

    def _block_numbers(self, n: int | Iterable[int]) -> list[int]:
        """Indices of blocks as timm takes them, to numbers of hidden states."""
        depth = len(self.blocks)
        indices = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        for index in indices:
            if not -depth <= index < depth or (isinstance(n, int) and index < 0):
                what = f"{n} blocks" if isinstance(n, int) else f"block {index}"
                raise UserError(f"{what}: this encoder has {depth} blocks, 0 to {depth - 1}")
        if not indices:
            raise UserError(f"n is {n!r}, which is no block: give how many from the end, or indices such as [0, -1]")
        return sorted({index % depth + 1 for index in indices})

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resample the positions once for another image size in pixels, a side or (height, width); see `ImageTrunk`.

        `preprocess` then makes that size, and `grid_size`, `num_patches` and `config` tell it. UserError for a native
        tower, which takes any size as it is.
        """
        if self.preprocess is not None and not hasattr(self.preprocess, "with_size"):
            raise UserError("encoder.preprocess is your own: set it to None, the size, then it to one of the new size")
        if self.architecture.native:
            raise UserError(
                "positions of native images are made for each; for more or fewer patches of one set "
                "encoder.preprocess = encoder.preprocess.with_patches(N)"
            )
        super().set_input_size(size)
        if self.preprocess is not None:
            self.preprocess = self.preprocess.with_size(self.input_size)

    def freeze(self, blocks: int | slice | None = None) -> Self:
        """Freeze all; with a number n the embeddings and the first n blocks; with a slice just those blocks.

        Frozen means requires_grad False. There is no dropout and no batch statistic, so train() needs no undoing.
        """
        inputs = (self.patch_embed, self.class_token, self.position_embedding, self.pre_norm)
        return self._set_trainable(False, blocks, lambda n: (*inputs, *self.blocks[:n]))

    def unfreeze(self, blocks: int | slice | None = None) -> Self:
        """Unfreeze all; with a number n the last n blocks and what is above them; with a slice just those blocks."""
        above = (self.norm, getattr(self, "head", None))
        return self._set_trainable(True, blocks, lambda n: (*self.blocks[len(self.blocks) - n :], *above))

    def _set_trainable(self, trainable: bool, blocks: int | slice | None, counted: Callable[[int], tuple]) -> Self:
        """`counted`: a number of blocks to these, with what lies beside them; None where a part is missing."""
        depth = len(self.blocks)
        if blocks is None:
            parts = (self,)
        elif isinstance(blocks, slice):
            parts = self.blocks[blocks]
        elif isinstance(blocks, bool) or not 0 <= blocks <= depth:
            raise UserError(
                f"{blocks!r} blocks: this encoder has {depth}; give 0 to {depth}, a slice, or nothing for all"
            )
        else:
            parts = counted(blocks)
        for part in parts:
            if part is not None:
                part.requires_grad_(trainable)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass: less memory, about a third more time; timm's name."""
        self.transformer.gradient_checkpointing = float(enable)

    @property
    def num_trainable_parameters(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks up to the last wanted layer."""
        return self.transformer.blocks

    @property
    def embed_dim(self) -> int:
        """D, channels of a token; `hidden_size` and `num_features` are the same."""
        return self.architecture.width

    hidden_size = num_features = embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.architecture.patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid

    @property
    def num_patches(self) -> int:
        """N, patch tokens per image of the set size."""
        return self.grid[0] * self.grid[1]

    @property
    def num_patches_per_side(self) -> int:
        """Rows, which are also the columns; UserError for a grid that is not square."""
        if self.grid[0] != self.grid[1]:
            raise UserError(f"a grid of {self.grid[0]}×{self.grid[1]} patches has no one side: use grid_size")
        return self.grid[0]

    @property
    def image_processor(self) -> Any:
        """`preprocess`, by the name that LLaVA reads."""
        return self.preprocess

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.position_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the output but under autocast."""
        return self.position_embedding.dtype

    @property
    def config(self) -> ImageEncoderConfig:
        """Shape and choices, by the names that VLM code reads."""
        shape, (height, width) = self.architecture, self.input_size
        return ImageEncoderConfig(
            layer=self.layer,
            norm=self.norm is not None,
            pool=self.pool,
            keep_prefix=self.keep_prefix,
            tower_depth=self.tower_depth,
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.mlp_dim,
            image_size=height if height == width else (height, width),
            patch_size=shape.patch_size,
            hidden_act=ACTIVATION_NAMES[shape.activation],
            layer_norm_eps=shape.norm_eps,
        )
