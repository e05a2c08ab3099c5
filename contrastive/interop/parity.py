"""Whether an exported folder says what the model says: the check that every export ends with.

The other library loads the folder and embeds the same pixels and ids; then its own processor and tokenizer make
pixels and ids from the same images and texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.table import Table

from contrastive.data.tokenizer import TransformersTokenizer
from contrastive.interop.bundle import Bundle
from contrastive.models import ImageClassifier
from contrastive.models.image_tower import ImageTower
from contrastive.patches import Patches

# Two float32 implementations of one tower differ by the order of their sums: 2e-7 in a unit vector at most over a few
# blocks, up to some 1e-6 over 30. A wrong activation, layer or mask gives 1e-4 and more, an epsilon of 1e-5 for 1e-6
# in a small tower no more than 8e-6. Logits and scores are sums over channels, which the larger limit is for.
EMBEDDING_LIMIT, MOST_EMBEDDING_LIMIT = 2e-6, 1e-5
BLOCKS_PER_LIMIT = 6
# A float16 weight is off by up to 2^-11 = 5e-4 of itself, at random: an embedding turns by about as much, a cosine of
# 1 - 1e-6, and more where activations are large. A float16 overflow or a wrong graph is far below this.
HALF_COSINE_LIMIT = 0.999
# Libraries resize differently by a level or two of 255 in some pixels; features must not notice.
FEATURE_COSINE_LIMIT = 0.9999
# Pillow resizes the columns of a high and narrow picture first, torch its rows: a level in one pixel of five. Squares
# of it are few pixels made of many; native images keep its shape, and a trained tower turns by 2e-4.
NATIVE_COSINE_LIMIT = 0.999
# ... which an untrained tower does not at all, so that pixels are bounded too: a wrong mean, crop or interpolation is
# off by tens of levels somewhere.
PIXEL_LEVELS = 8.0
# Differences of resizing are rare, 0.003 levels on the average; a mean or std that is a little off is everywhere.
MEAN_PIXEL_LEVELS = 0.1

# No stray white space and no HTML entities, which some libraries mend and others do not: the writers say so.
TEXTS = (
    "a photo of a cat",
    "Two dogs, running on the beach; it's 10:45!",
    "A café in Zürich",
    "x",
    "a very long caption that goes on and on, " * 29 + "and on",
)


@dataclass(frozen=True)
class Outputs:
    """What a model says about a few images and texts, whichever library computes it.

    Each is None where the format or the model has no such part.
    """

    image: torch.Tensor | None = None
    """(B, E) float32, unit length."""
    text: torch.Tensor | None = None
    """(T, E) float32, unit length."""
    logits: torch.Tensor | None = None
    """(B, T) float32: scale · image · textᵀ, plus the bias where there is one. Of a classifier its (B, C) scores."""
    pixels: torch.Tensor | Patches | None = None
    """(B, 3, H, W) float32, or Patches: the images as the folder's own preprocessing makes them."""
    tokens: torch.Tensor | None = None
    """(T, N) int64: the texts as the folder's own tokenizer makes them."""


@dataclass(frozen=True)
class Check:
    """One figure and its limit."""

    what: str
    kind: str
    """'max difference', 'mean difference', 'cosine' (the lowest), or 'ids that differ'."""
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.value >= self.limit if self.kind == "cosine" else self.value <= self.limit

    @property
    def written(self) -> tuple[str, str]:
        """The figure and the limit as text."""
        if self.kind == "cosine":
            return f"{self.value:.7f}", f"≥ {self.limit}"
        if self.kind == "ids that differ":
            return f"{self.value:.0f}", "0"
        return _short(f"{self.value:.1e}"), _short(f"≤ {self.limit:.0e}")


@dataclass(frozen=True)
class Probe:
    """What both sides are asked: images and texts, and what our own preprocessing makes of them."""

    images: list[Image.Image]
    texts: list[str]
    pixels: torch.Tensor | Patches | None
    """None for a text tower alone."""
    tokens: torch.Tensor | None

    @classmethod
    def of(cls, bundle: Bundle) -> "Probe":
        """Where the source lacks preprocessing or tokenizer: noise of the right size, ids of the right range."""
        images, texts, pixels, tokens = [probe_image(*size) for size in _sizes(bundle)], list(TEXTS), None, None
        if isinstance(bundle.tokenizer, TransformersTokenizer):  # cleaning is ours and not in its files
            texts = [bundle.tokenizer.cleaned(text) for text in texts]
        config, generator = bundle.config, torch.Generator().manual_seed(0)
        if bundle.preprocess:
            pixels = bundle.preprocess(images)
        elif bundle.preprocess is not None:
            pixels = _some_pixels(bundle.model.image_tower, len(images), generator)
        if bundle.tokenizer:
            tokens = bundle.tokenizer(texts)
        elif bundle.tokenizer is not None:
            tokens = _some_tokens(config.text, len(texts), generator)
        return cls(images, texts, pixels, tokens)


def compare(bundle: Bundle, probe: Probe, outputs: Callable[[Probe], Outputs], half: bool = False) -> list[Check]:
    """Compare the model with what the folder's library says; `half`: it computes in float16.

    Returns:
        The figures, failed ones too; none where the folder has no such part.
    """
    theirs = outputs(probe)
    ours = own_outputs(bundle, probe)
    suffix = ", float16" if half else ""
    checks = []
    for what, own, other, scale in (
        ("image embeddings", ours.image, theirs.image, 1.0),
        ("text embeddings", ours.text, theirs.text, 1.0),
        ("scores" if isinstance(bundle.model, ImageClassifier) else "logits", ours.logits, theirs.logits, None),
    ):
        if own is None or other is None:
            continue
        if own.shape != other.shape:
            checks.append(Check(f"{what} of shape {tuple(other.shape)}", "max difference", float("nan"), 0.0))
        elif not half:
            limit = MOST_EMBEDDING_LIMIT * logit_size(bundle, own) if scale is None else embedding_limit(bundle)
            checks.append(Check(what, "max difference", _distance(own, other), limit))
        elif scale is not None:
            checks.append(Check(what + suffix, "cosine", _cosine(own, other), HALF_COSINE_LIMIT))
    if half:
        return checks
    if theirs.tokens is not None and bundle.tokenizer:
        alike = probe.tokens.shape == theirs.tokens.shape
        differing = (probe.tokens != theirs.tokens).sum().item() if alike else float("nan")
        checks.append(Check("tokens", "ids that differ", differing, 0))
    if theirs.pixels is not None and bundle.preprocess:
        checks += _pixel_checks(bundle, probe.pixels, theirs.pixels)
    return checks


def own_outputs(bundle: Bundle, probe: Probe) -> Outputs:
    """What our model says about the probe."""
    model, image, text, logits = bundle.model, None, None, None
    with torch.inference_mode():
        if probe.pixels is not None:
            image = model.encode_image(probe.pixels)
        if probe.tokens is not None:
            text = model.encode_text(probe.tokens)
        if isinstance(model, ImageClassifier):
            logits = model.scores(probe.pixels)
        elif image is not None and text is not None:
            logits = logits_of(model, image, text)
    return Outputs(image, text, logits)


def logits_of(model: torch.nn.Module, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the (B, T) logits of embeddings by a model's scale and bias, which open_clip calls as we do."""
    logits = model.logit_scale.exp() * image @ text.T
    return logits if model.logit_bias is None else logits + model.logit_bias


def embedding_limit(bundle: Bundle) -> float:
    """How far two computations of a unit vector may lie apart in a channel; it grows with the deeper tower's depth."""
    towers = (getattr(bundle.model, name, None) for name in ("image_tower", "text_tower"))
    depth = max(tower.config.depth for tower in towers if tower is not None)
    return min(EMBEDDING_LIMIT * max(1, depth // BLOCKS_PER_LIMIT), MOST_EMBEDDING_LIMIT)


def logit_size(bundle: Bundle, logits: torch.Tensor) -> float:
    """What an error in an embedding is multiplied with on its way to the logits; 1 at least.

    The factor on the similarities; of a classifier, whose head is any linear map, the size of its scores.
    """
    if isinstance(bundle.model, ImageClassifier):
        return max(1.0, logits.abs().max().item())
    return max(1.0, bundle.model.logit_scale.exp().item())


def padded(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return our pixels with those that patches pass over, as zeros on the right and below, where a model has such."""
    return torch.nn.functional.pad(pixels, (0, size[1] - pixels.shape[-1], 0, size[0] - pixels.shape[-2]))


def cropped(images: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return a library's pixels without those that patches pass over; `like` has the size that they fill."""
    return torch.stack(list(images))[..., : like.shape[-2], : like.shape[-1]]


def parity_table(checks: Sequence[Check]) -> Table:
    """The checks for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("against the model itself")
    table.add_column("measure")
    table.add_column("found", justify="right")
    table.add_column("limit", justify="right")
    for check in checks:
        found, limit = check.written
        table.add_row(check.what, check.kind, found if check.passed else f"[red]{found}[/red]", limit)
    return table


def probe_image(width: int, height: int) -> Image.Image:
    """A picture with slopes, waves, sharp edges and noise, the same every time."""
    rng = np.random.default_rng(width * 10_000 + height)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    channels = []
    for _ in range(3):
        wave = sum(np.sin(2 * np.pi * (fx * x + fy * y) + shift) for fx, fy, shift in rng.uniform(0.3, 6, (4, 3)))
        channels.append(128 + 25 * wave + 40 * (x - y))
    picture = np.stack(channels, axis=2)
    for left, top in rng.uniform(0, 0.7, (3, 2)):
        inside = (x > left) & (x < left + 0.25) & (y > top) & (y < top + 0.2)
        picture[inside] = rng.integers(0, 256, 3)
    picture += rng.normal(0, 6, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _sizes(bundle: Bundle) -> list[tuple[int, int]]:
    """(width, height) of images: wide, high, tall at the very size, square and large, square and small.

    Scaled to the size of a crop they leave an even number of pixels to cut off: where the middle lies between two
    pixels, some libraries take the one and some the other, and the writers say so.
    """
    if not bundle.preprocess:
        return [(64, 64)] * 4
    options = bundle.preprocess.config
    side = options.short_side or min(options.size)
    if options.resize == "native":
        long = min(4, options.most_patches)
        return [
            (long * side, side),
            (side, long * side),
            (3 * side, 2 * side),
            (side, side),
            (side // 2 + 1, side // 3),
        ]
    more = 2 * max(1, side // 8)
    return [
        (3 * (side + more), 3 * side),
        (2 * side, 2 * (side + 2 * more)),
        (side, side + more),
        (4 * side, 4 * side),
        (side // 2 + 1, side // 2 + 1),
    ]


def _some_pixels(tower: ImageTower, count: int, generator: torch.Generator) -> torch.Tensor | Patches:
    """Noise of the size that the tower takes; of one that takes any, grids that get wider and lower."""
    height, width = tower.input_size
    if not tower.config.native:
        return torch.randn(count, 3, height, width, generator=generator)
    patch, rows = tower.config.patch_size, tower.grid[0]
    sizes = ((max(1, rows - k) * patch, width + k * patch) for k in range(count))
    return Patches.batch([Patches.of(torch.randn(3, *size, generator=generator), patch) for size in sizes])


def _some_tokens(config, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, context_length) ids with an end-of-text where texts of different lengths would have it."""
    tokens = torch.randint(0, config.vocab_size, (count, config.context_length), generator=generator)
    if config.eos_id is not None:
        tokens[tokens == config.eos_id] = (config.eos_id + 1) % config.vocab_size
        ends = torch.linspace(1, config.context_length - 1, count).long()
        tokens[torch.arange(count), ends] = config.eos_id
    return tokens


def _pixel_checks(bundle: Bundle, ours: torch.Tensor | Patches, theirs: torch.Tensor | Patches) -> list[Check]:
    native = isinstance(ours, Patches)
    if native and not torch.equal(ours.grids, theirs.grids):
        return [Check("patches of other grids", "max difference", float("nan"), 0.0)]
    if not native and ours.shape != theirs.shape:
        return [Check(f"pixels of shape {tuple(theirs.shape)}", "max difference", float("nan"), 0.0)]
    with torch.inference_mode():
        own, other = (bundle.model.encode_image(pixels) for pixels in (ours, theirs))
    if native:
        ours, theirs = (pixels.values[pixels.mask] for pixels in (ours, theirs))
    limit = NATIVE_COSINE_LIMIT if native else FEATURE_COSINE_LIMIT
    level = 1 / 255 / min(bundle.preprocess.config.std)
    mean = (ours.double() - theirs.double()).abs().mean().item()
    return [
        Check("pixels", "max difference", _distance(ours, theirs), PIXEL_LEVELS * level),
        Check("pixels", "mean difference", mean, MEAN_PIXEL_LEVELS * level),
        Check("image embeddings of those pixels", "cosine", _cosine(own, other), limit),
    ]


def _short(number: str) -> str:
    """1e-5 for 1e-05, 0 for 0.0e+00."""
    return number.replace("e-0", "e-").replace("e+0", "e+").replace("0.0e+0", "0")


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The lowest over rows; float32 rounding can put it a little above 1, float64 hardly."""
    return torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
