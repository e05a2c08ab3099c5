"""Small models on disk, of each pooling, and calling the script."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from towers import KINDS

from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.tokenizer import train_bpe
from contrastive.files import write_folder
from contrastive.interop.bundle import save_classifier, save_model
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ModelConfig

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "visualize.py"


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
    write_folder(folder, lambda to: save_classifier(to, weights, config, seen, ("a", "b", "c")))
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
