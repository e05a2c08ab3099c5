"""Our preprocessing beside that of transformers, open_clip and timm, on the same photographs.

    python benchmarks/interop.py --data flickr8k/dev-000000.tar

For each mode: the largest and the mean difference of a pixel in levels of 255, and the lowest cosine between the
features that a ViT-Ti/16 with random weights gives of both. Ours is set up by the library's own files. The last mode is
what a wrong cut of the centre costs. Rows go to results/interop.jsonl.
"""

import io
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import append, run_benchmark

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.data.sources import open_source
from contrastive.interop.formats.evaluation_transform import read_open_clip_transform, read_timm_transform
from contrastive.interop.formats.transformers_preprocess import read_preprocess
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig

SIZE, PATCH = 224, 16
TOWER = ImageTowerConfig(image_size=SIZE, patch_size=PATCH)
Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Options:
    data: str
    """Images, as a training run takes them."""
    images: int = 200
    """How many, from the front."""


def transformers_mode(name: str, backend: str, **options) -> tuple[Preprocess, Transform]:
    """Our preprocessing and transformers', both made from the file that its processor saves."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = {"shortest_edge": SIZE} if name == "CLIPImageProcessor" else {"height": SIZE, "width": SIZE}
    classes = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}
    processor = (classes[name] if backend == "pil" else getattr(transformers, name))(size=size, **options)
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, name)(size=size, **options).save_pretrained(folder)
        ours = read_preprocess(Path(folder), SIZE, PATCH)
    return ours, lambda image: torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])


def open_clip_mode(resize_mode: str, interpolation: str) -> tuple[Preprocess, Transform]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    options = {"resize_mode": resize_mode, "interpolation": interpolation, "mean": CLIP_MEAN, "std": CLIP_STD}
    transform = image_transform_v2(PreprocessCfg(size=SIZE, **options), is_train=False)
    return read_open_clip_transform(options, {}, TOWER, (SIZE, SIZE), Path("these options")), transform


def timm_mode(**options) -> tuple[Preprocess, Transform]:
    from timm.data import create_transform

    statistics = {"mean": CLIP_MEAN, "std": CLIP_STD}
    transform = create_transform((3, SIZE, SIZE), is_training=False, **options, **statistics)
    return read_timm_transform({**options, **statistics}, TOWER, (SIZE, SIZE), Path("these options")), transform


def modes() -> dict[str, tuple[Preprocess, Transform]]:
    clip, theirs = transformers_mode("CLIPImageProcessor", "torchvision")
    shifted = Preprocess(PreprocessConfig(SIZE, resize="crop", mean=CLIP_MEAN, std=CLIP_STD))
    assert shifted.config == replace(clip.config, cut="round")  # so that it differs by the cut alone
    return {
        "SigLIP squash, transformers": transformers_mode("SiglipImageProcessor", "torchvision"),
        "SigLIP squash, transformers with Pillow": transformers_mode("SiglipImageProcessor", "pil"),
        "SigLIP 2 bilinear, transformers": transformers_mode("SiglipImageProcessor", "torchvision", resample=2),
        "CLIP crop, transformers": (clip, theirs),
        "CLIP crop, transformers with Pillow": transformers_mode("CLIPImageProcessor", "pil"),
        "CLIP crop, open_clip": open_clip_mode("shortest", "bicubic"),
        "squash, open_clip": open_clip_mode("squash", "bicubic"),
        "squash bilinear, open_clip": open_clip_mode("squash", "bilinear"),
        "crop_pct 0.9, timm": timm_mode(crop_pct=0.9, interpolation="bicubic", crop_mode="center"),
        "wrong on purpose: open_clip's cut, transformers' pixels": (shifted, theirs),
    }


@torch.inference_mode()
def compare(
    ours: Preprocess, theirs: Transform, images: list[Image.Image], tower: ImageModel
) -> dict[str, float | int]:
    largest, total, cosine, shifted = 0.0, 0.0, 1.0, 0
    for image in track(images, transient=True, disable=not sys.stdout.isatty()):
        own, other = ours(image), theirs(image).float()
        levels = (own - other).abs() * torch.tensor(ours.config.std).view(3, 1, 1) * 255
        largest, total = max(largest, levels.max().item()), total + levels.mean().item()
        shifted += levels.max().item() > 20
        features = tower.encode_image(torch.stack([own, other]))
        cosine = min(cosine, torch.dot(features[0].double(), features[1].double()).item())
    figures = {"max_levels": round(largest, 3), "mean_levels": round(total / len(images), 4)}
    return {**figures, "lowest_cosine": round(cosine, 7), "images_off_by_20_levels": shifted}


def main(options: Options) -> None:
    source = open_source(options.data)
    records = (source[index] for index in range(min(options.images, len(source))))
    images = [Image.open(io.BytesIO(record.image)).convert("RGB") for record in records]
    torch.manual_seed(0)
    shape = {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768}
    tower = ImageModel(ImageModelConfig(192, ImageTowerConfig(image_size=SIZE, patch_size=PATCH, **shape))).eval()
    table = Table("mode", "largest", "mean", "lowest cosine", "images off", box=SIMPLE_HEAD)
    versions = {name: version(name) for name in ("transformers", "open_clip_torch", "timm", "pillow")}
    for name, (ours, theirs) in modes().items():
        row = compare(ours, theirs, images, tower)
        append("interop", {"what": name, "images": len(images), **row, "libraries": versions}, shlex.join(sys.argv))
        table.add_row(name, *(str(value) for value in row.values()))
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    run_benchmark("interop.py", Options, __doc__, main)
