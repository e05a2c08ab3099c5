"""The options of a run's data."""

from dataclasses import dataclass, field
from typing import Literal

from contrastive.data.augment import AugmentConfig


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they reach the model."""

    train: str = "scenes"
    """Training pairs: scenes, digits, shards ('path/{0000..0099}.tar'), hf:NAME, a table, an image folder."""
    eval: tuple[str, ...] = ()
    """Held-out sources: labelled ones are scored zero-shot, captioned ones by retrieval."""
    image_column: str | None = None
    """Column of a table that holds the image or its path; none: found by its usual names."""
    caption_column: str | None = None
    """Column of a table that holds the caption; none: found by its usual names."""
    prompts: str = "auto"
    """Prompt templates for labelled data: a set's name, a file with one template a line, or auto."""
    tokenizer: str = "auto"
    """bpe trained on the captions, clip, or a tokenizer folder; auto: clip for models with its vocabulary, else bpe."""
    vocab_size: int = 8192
    """Largest vocabulary of a bpe trained on the run's captions."""
    resize: Literal["squash", "crop"] = "squash"
    """Evaluation images: squashed to the square as in SigLIP, or short side resized and centre-cropped as in CLIP."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1, per channel."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides what is left, per channel."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: int | None = None
    """Loader processes per rank; none: 0 without a GPU, else the rank's share of the cores up to 8."""
    timeout: float = 300.0
    """Seconds to wait for a batch from the workers before an error."""
