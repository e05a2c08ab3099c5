"""The options of a run's data."""

from dataclasses import dataclass, field

from contrastive.data.augment import AugmentConfig
from contrastive.data.captions import Cleaning, sampled_captions
from contrastive.data.preprocess import PreprocessOptions
from contrastive.data.record import Source
from contrastive.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from contrastive.errors import UserError
from contrastive.option_types import NotNegative, Positive, Probability, Share

CONTEXT_LENGTH = 64


@dataclass(frozen=True)
class NativeConfig:
    """How native images are trained on, which keep their aspect: see model.image.native."""

    patches: Positive[tuple[int, ...]] = ()
    """The most patches of an image in training; of several numbers one is drawn for each step (NaFlex). None: as many
    as in evaluation, data.preprocess.patches."""


@dataclass(frozen=True)
class ImageDataConfig:
    """How images are found, ordered, varied and handed to the model."""

    train: str = ""
    """What to train on."""
    eval: tuple[str, ...] = ()
    """What is held out to score on."""
    image_column: str | None = None
    """Column of a table that holds the image or its path; none: found by its usual names."""
    classes: str | None = None
    """Names of the classes of labelled data: a set (imagenet, ...) or a file, joined by name; none: its own."""
    preprocess: PreprocessOptions = field(default_factory=PreprocessOptions)
    native: NativeConfig = field(default_factory=NativeConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    num_workers: NotNegative[int | None] = None
    """Loader processes per rank; none: 0 without a GPU, else the rank's share of the cores up to 8."""
    timeout: Positive[float] = 300.0
    """Seconds to wait for a batch from the workers, or for another rank's, before an error."""
    max_bad_share: Share[float] = 0.01
    """Share of samples that may be unusable; with more of the last `bad_window`, the run stops."""
    bad_window: Positive[int] = 10_000
    """Samples over which that share is taken."""
    window: Positive[int | None] = None
    """Samples shuffled among themselves; none: all of the data up to 4 million local samples, else 16,384."""
    lanes: Positive[int | None] = None
    """Places in the data that a batch is read from at once, where a window is less than the data; a divisor of the
    batch; none: the largest up to 64."""
    replacement: bool = False
    """Draw each sample from all of the data, whatever was drawn before, instead of each one once an epoch."""

    # What the options were called when they stood here one by one.
    RENAMED = {name: f"preprocess.{name}" for name in ("resize", "mean", "std", "interpolation", "short_side", "cut")}


@dataclass(frozen=True)
class CaptionOptions:
    """Where captions are found and how they become tokens."""

    caption_column: str | None = None
    """Column, field of KEY.json or suffix (txt) of captions; several with weights: alt=1,txt=3; none: usual names."""
    caption_templates: tuple[str, ...] = ("{}",)
    """Texts of which one is drawn for each caption, which takes the place of {}: "{}" "a photo of {}"."""
    clean: Cleaning = "none"
    """Cleaning of captions, prompts and every text later on: whitespace (mends), clip (and lower-cases), canonicalize
    (SigLIP's)."""
    templates: str = "auto"
    """Prompt templates for labelled data: a set's name, a file with one template a line, or auto."""
    tokenizer: str = "bpe"
    """bpe trained on the captions, clip, or a tokenizer folder."""
    vocab_size: int = 8192
    """Largest vocabulary of a bpe trained on the captions."""

    RENAMED = {"prompts": "templates"}

    def __post_init__(self):
        for template in self.caption_templates:
            if "{}" not in template:
                raise UserError(f"caption_templates: '{template}' has no '{{}}' for the caption; each needs {{}}")
        if not self.caption_templates:
            raise UserError("caption_templates is empty; leave it out for captions as they are")

    def make_tokenizer(self, source: Source, context_length: int | None) -> Tokenizer:
        """Return what `tokenizer` names; a bpe is trained on the captions of `source`.

        context_length: ids of a text; None: 64 for bpe, 77 for clip, what a saved tokenizer says.

        Raises:
            UserError: as `load_tokenizer` and `train_bpe`.
        """
        if self.tokenizer == "bpe":
            return train_bpe(sampled_captions(source), self.vocab_size, context_length or CONTEXT_LENGTH, self.clean)
        return load_tokenizer(self.tokenizer, context_length, None if self.clean == "none" else self.clean)


@dataclass(frozen=True)
class DataConfig(CaptionOptions, ImageDataConfig):
    """Where pairs come from and how they reach the model."""

    train: str = "scenes"
    """Training pairs: scenes, digits, shards ('path/{0000..0099}.tar'), hf:NAME, a table, an image folder; or
    several with weights: 'shards/{00..09}.tar=2,pairs.csv=1'."""
    eval: tuple[str, ...] = ()
    """Held-out sources: labelled ones are scored zero-shot, captioned ones by retrieval."""
    captions_per_image: Positive[int] = 1
    """Captions of an image in one step, each a pair with it among the others' captions: the loss is their mean. The
    image is embedded once, so where texts are short a step learns more for little more time."""
    spread_captions: bool = False
    """Draw the K captions evenly over the weights of caption_column: of short=1,long=1 and K 2, one of each column."""
    token_dropout: Probability[float] = 0.0
    """Share of a caption's tokens left out in training, drawn anew each time. 0.1 to 0.3 where captions are few."""
    RENAMED = ImageDataConfig.RENAMED | CaptionOptions.RENAMED
    tokenizer: str = "auto"
    """bpe trained on the captions, clip, or a tokenizer folder; auto: clip for models with its vocabulary, else bpe."""


@dataclass(frozen=True)
class LabelledDataConfig(ImageDataConfig):
    """Where labelled images come from and how they reach the classifier."""

    train: str = "mnist"
    """Labelled images: a well-known set (mnist, cifar10, food101, ...), a folder of MNIST's or CIFAR's files, shards,
    hf:NAME, a table or class folders."""
    eval: tuple[str, ...] = ()
    """Held-out labelled images; none: the test split of the training data, where it has one."""
    share: float = 1.0
    """Share of each class to train on, always the same samples: 0.01 as if one label in a hundred were known."""
