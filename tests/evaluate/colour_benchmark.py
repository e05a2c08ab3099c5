"""Models and data for CLIP_benchmark: of colours, whose right answers are known, and of random weights."""

import io
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from colour_model import COLOURS, bundle
from PIL import Image

from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.record import Record, Source
from contrastive.data.tokenizer import train_bpe
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.models import DualEncoder, ModelConfig


def tokenizer(texts):
    """The colour that a text names, else the three numbers it is, else any three of its own."""
    return torch.tensor([_ids(text) for text in texts])


def _ids(text):
    words = text.split()
    named = [COLOURS[word] for word in words if word in COLOURS]
    numbers = [int(word) for word in words if word.isdecimal()]
    return (named or [numbers or list(zlib.crc32(text.encode()).to_bytes(4, "big")[:3])])[0]


def colour_bundle(**changes):
    return SimpleNamespace(**vars(bundle()) | {"tokenizer": tokenizer} | changes)


def picture(colour, kind="PNG"):
    data = io.BytesIO()
    Image.fromarray(np.broadcast_to(np.uint8(colour), (5, 7, 3)).copy()).save(data, kind, lossless=True)
    return data.getvalue()


class Labelled(Source):
    """A torchvision dataset as one of our sources."""

    name, fingerprint = "torchvision", "0"

    def __init__(self, dataset, class_names):
        self.dataset, self.class_names = dataset, class_names

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return Record(str(index), self.dataset[index][0], label=self.label(index))

    def label(self, index):
        return int(self.dataset[index][1])


def random_run(folder):
    """A run folder with a small model of random weights."""
    words = train_bpe(["a photo of the number: 0123456789"] * 4, vocab_size=280, context_length=16)
    small = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    ids = {"vocab_size": words.vocab_size, "eos_id": words.eos_id, "pad_id": words.pad_id, "context_length": 16}
    image = replace(ModelConfig().image, image_size=16, patch_size=8, **small)
    config = ModelConfig(embed_dim=16, image=image, text=replace(ModelConfig().text, **small, **ids))
    weights = DualEncoder(config).state_dict()
    preprocess = PreprocessConfig(image_size=16)
    write_folder(folder / "final", lambda to: save_model(to, weights, config, preprocess, words))
    return folder
