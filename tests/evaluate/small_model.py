"""A small untrained model with all that belongs to it, and calling a script as a command would."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.sources.scenes import PAIRS
from contrastive.data.tokenizer import train_bpe
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.models import DualEncoder, ModelConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def save_small_model(folder, seed=0, num_heads=2, words=PAIRS):
    """Write a model of 16 px images, 32 features after the projection and 48 before it."""
    torch.manual_seed(seed)
    tokenizer = train_bpe([" ".join(pair) for pair in words] * 4, vocab_size=300, context_length=12)
    config = ModelConfig(embed_dim=32)
    size = {"width": 48, "depth": 1, "num_heads": num_heads, "mlp_dim": 64}
    image = replace(config.image, image_size=16, patch_size=8, projection=True, **size)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id")}
    text = replace(config.text, context_length=12, **ids, **size)
    config = replace(config, image=image, text=text)
    weights = DualEncoder(config).state_dict()
    write_folder(folder, lambda to: save_model(to, weights, config, PreprocessConfig(image_size=16), tokenizer))
    return folder


def script_caller(name, monkeypatch, capfd):
    """Return what calls a script as a command would, without the seconds that a new process takes."""
    script = SCRIPTS / name

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return call
