"""The loaders that benchmarks/data.py compares: each from the same shards to batches of 224 x 224, without end."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch

RivalName = Literal["ours", "open_clip", "webdataset", "datasets"]
RIVALS: tuple[RivalName, ...] = get_args(RivalName)
PACKAGES = {
    "open_clip": ("open_clip_torch", "webdataset", "pillow"),
    "webdataset": ("webdataset", "torchvision"),
    "datasets": ("datasets", "torchvision", "pillow"),
}
IMAGE_SIZE = 224
SCALE = (0.9, 1.0)
CONTEXT_LENGTH = 77
STEPS = 10**6  # more than anyone waits for
SHUFFLED = 1000


@dataclass(frozen=True)
class Load:
    """What a rival is asked for. cache: a folder that datasets may write its Arrow files to."""

    shards: str
    batch: int
    workers: int
    cache: str


def rival_version(name: str) -> str:
    if name == "ours":
        return f"contrastive {version('contrastive')}"
    return ", ".join(f"{package} {version(package)}" for package in PACKAGES[name])


def import_rivals() -> None:
    """Import what the rivals import, so that processes forked later need not."""
    for module in ("datasets", "open_clip", "open_clip_train.data", "torchvision.transforms.v2", "webdataset"):
        importlib.import_module(module)


def batches(name: RivalName, load: Load) -> Iterator[torch.Tensor]:
    """Yield image batches (B, 3, 224, 224): uint8, or float32 normalised from open_clip, whose transform does so."""
    build: dict[str, Callable[[Load], Iterator[torch.Tensor]]] = {
        "ours": _ours,
        "open_clip": _open_clip,
        "webdataset": _webdataset,
        "datasets": _datasets,
    }
    return build[name](load)


def _ours(load: Load) -> Iterator[torch.Tensor]:
    from contrastive.data.augment import AugmentConfig
    from contrastive.data.loader import train_loader
    from contrastive.data.order_choice import order_for
    from contrastive.data.samples import PairDataset
    from contrastive.data.sources import open_source
    from contrastive.data.tokenizer import clip_tokenizer

    source = open_source(load.shards)
    order = order_for(source, load.batch, 0)
    augment = AugmentConfig(crop_scale=SCALE)
    dataset = PairDataset(source, order, clip_tokenizer(CONTEXT_LENGTH), IMAGE_SIZE, augment)
    loader = train_loader(dataset, num_steps=STEPS, num_workers=load.workers)
    return (batch["image"] for batch in loader)


def _open_clip(load: Load) -> Iterator[torch.Tensor]:
    """open_clip_train's get_wds_dataset as its training calls it, with the transform of its models."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform
    from open_clip_train import data
    from webdataset.tariterators import tar_file_expander

    options = SimpleNamespace(
        train_data=load.shards,
        train_num_samples=STEPS * load.batch,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=load.workers,
        batch_size=load.batch,
        world_size=1,
    )
    # webdataset 1.0 marks the end of a shard by an empty sample, on which open_clip 3.3 fails (KeyError 'fname').
    data.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    transform = image_transform(IMAGE_SIZE, is_train=True)  # scale 0.9 to 1 is its default
    tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    return (images for images, _ in data.get_wds_dataset(options, transform, True, tokenizer=tokenizer).dataloader)


def _webdataset(load: Load) -> Iterator[torch.Tensor]:
    """The webdataset library with torchvision's decoder and transforms on uint8 tensors."""
    import webdataset
    from open_clip.tokenizer import SimpleTokenizer
    from torchvision.io import ImageReadMode, decode_image

    crop, tokenizer = _torchvision_crop(), SimpleTokenizer(context_length=CONTEXT_LENGTH)

    def image(data: bytes) -> torch.Tensor:
        return crop(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))

    samples = (
        webdataset.WebDataset(load.shards, shardshuffle=100, seed=0)
        .shuffle(SHUFFLED)
        .to_tuple("jpg", "txt")
        .map_tuple(image, lambda text: tokenizer(text.decode())[0])
        .batched(load.batch, partial=False)
        .repeat()
    )
    return (images for images, _ in webdataset.WebLoader(samples, batch_size=None, num_workers=load.workers))


def _datasets(load: Load) -> Iterator[torch.Tensor]:
    """A map-style dataset of `datasets`, in Arrow files made from the shards before, with torchvision's transforms."""
    from open_clip.tokenizer import SimpleTokenizer
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    crop, tokenizer = v2.Compose([_torchvision_crop(), v2.PILToTensor()]), SimpleTokenizer(context_length=77)

    def transform(rows: dict[str, list]) -> dict[str, list]:
        images = [crop(image.convert("RGB")) for image in rows["jpg"]]
        return {"image": images, "tokens": list(tokenizer(rows["txt"]))}

    rows = arrow_rows(load).select_columns(["jpg", "txt"]).with_transform(transform)
    loader = DataLoader(rows, load.batch, shuffle=True, drop_last=True, num_workers=load.workers)
    return (batch["image"] for _ in range(STEPS) for batch in loader)


def arrow_rows(load: Load) -> Any:
    """Return the shards as a map-style dataset; its files are made by the first call."""
    import datasets
    from braceexpand import braceexpand

    datasets.disable_progress_bars()
    files = sorted(braceexpand(load.shards))
    return datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=load.cache)


def _torchvision_crop() -> torch.nn.Module:
    from torchvision.transforms import InterpolationMode, v2

    return v2.RandomResizedCrop(IMAGE_SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
