"""Small towers of each kind with random weights that do something; models of them on disk; calling the script."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ModelConfig
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise_tower

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "visualize.py"
SMALL = ImageTowerConfig(image_size=24, patch_size=8, width=32, depth=3, num_heads=4, mlp_dim=48)
KINDS = {
    "class": replace(SMALL, pool="class", class_token=True, projection=True, pre_norm=True, patch_bias=False),
    "average": replace(SMALL, pool="average"),
    "average, class token": replace(SMALL, pool="average", class_token=True, projection=True),
    "attention": SMALL,
    "attention, projection": replace(SMALL, projection=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_tower(kind, seed=0, **options):
    config = replace(KINDS[kind], **options)
    torch.manual_seed(seed)
    tower = ImageTower(config, embed_dim=16 if config.projection else config.width)
    initialise_tower(tower, "siglip")
    with torch.no_grad():  # biases start at zero, and a picture that forgets them would not be noticed
        for weight in tower.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return tower.eval()


def noise(*size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def save_dual(folder, kind, bias=None, **preprocess):
    torch.manual_seed(0)
    tokenizer = train_bpe(["a red circle", "a blue star on a plain background"] * 4, vocab_size=300, context_length=12)
    image = KINDS[kind]
    config = ModelConfig(embed_dim=16 if image.projection else image.width, init_logit_bias=bias)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id")}
    text = replace(config.text, context_length=12, width=32, depth=1, num_heads=4, mlp_dim=48, **ids)
    config = replace(config, image=image, text=text)
    weights, seen = DualEncoder(config).state_dict(), PreprocessConfig(image_size=24, **preprocess)
    write_folder(folder, lambda to: save_model(to, weights, config, seen, tokenizer))
    return folder


def save_plain(folder):
    torch.manual_seed(0)
    config = ClassifierConfig(image=KINDS["class"], embed_dim=16, num_classes=3)
    weights, seen = ImageClassifier(config).state_dict(), PreprocessConfig(image_size=24)
    write_folder(folder, lambda to: save_model(to, weights, config, seen, class_names=("a", "b", "c")))
    return folder


def call_visualize(monkeypatch, capfd, *arguments):
    """Call the script as a command would, without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--device", "cpu"])
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())
