"""`contrastive.load_image_encoder`: the image tower of any model that we can read, for VLM builders."""

from collections.abc import Iterable
from pathlib import Path

import torch

from contrastive.errors import UserError
from contrastive.interop.image_processor import ImageProcessor
from contrastive.interop.loading import read
from contrastive.models.image_encoder import ImageEncoder


def load_image_encoder(
    path: str | Path,
    layer: int | Iterable[int] = -2,
    norm: bool = False,
    pool: str | None = None,
    *,
    keep_prefix: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> ImageEncoder:
    """Load an image tower up to a layer, with its preprocessing; no tokenizer and no text tower stay.

    Args:
        path: as `contrastive.load` takes it: a run, a checkpoint, a model folder of ours, transformers, open_clip or
            timm, or a hub name. A classifier's tower will do.
        layer, norm, pool, keep_prefix: what comes out; see `ImageEncoder`. The default is LLaVA's: the patch tokens
            before the last block.
        device, dtype: of the weights, and of the output. torch.bfloat16 halves the memory.

    Returns:
        The encoder in eval mode, all of it trainable (`freeze()` it, or parts). `encoder.preprocess(image)` makes
        its pixels; where the folder lacks the files for that, the use of it says what is missing.

    Raises:
        UserError: no model there, none with an image tower, no such layer, or a pooling that the tower has not.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError("dtype has to be torch.float32, torch.bfloat16 or torch.float16, or its name")
    bundle = read(path, with_tokenizer=False)
    bundle.check_image_tower("there is nothing to encode images with")
    try:
        encoder = ImageEncoder(
            bundle.model.image_tower,
            layer,
            norm,
            pool,
            keep_prefix=keep_prefix,
            preprocess=ImageProcessor(bundle.preprocess),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return encoder.eval().to(device, dtype)
