"""A model whose embedding is the mean colour, and sources of plain pictures: right answers are known."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.record import BadSample, Record, Source

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}


class ColourModel(nn.Module):
    """Embeds a picture as its mean colour; `collapsed` embeds everything alike."""

    def __init__(self, collapsed: bool = False):
        super().__init__()
        self.config = SimpleNamespace(embed_dim=3)
        self.towers = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])
        self.collapsed = collapsed
        self.text_tower = SimpleNamespace(pack=lambda tokens: tokens)

    def encode_image(self, pixels):
        assert not self.training and not torch.is_grad_enabled()
        return self._embed(pixels.mean(dim=(2, 3)))

    def encode_text(self, tokens):
        assert not self.training and not torch.is_grad_enabled()
        return self._embed(tokens.float())

    def _embed(self, features):
        return F.normalize(torch.ones_like(features) if self.collapsed else self.towers[0](features), dim=-1)


def tokenizer(texts):
    """The colour named in each text as its three ids."""
    return torch.tensor([next(COLOURS[word] for word in text.split() if word in COLOURS) for text in texts])


def bundle(collapsed: bool = False):
    preprocess = Preprocess(PreprocessConfig(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    return SimpleNamespace(model=ColourModel(collapsed), tokenizer=tokenizer, preprocess=preprocess)


class ColourSource(Source):
    """Plain pictures.

    Args:
        shown: the colour each picture has.
        labels: what it is said to have; by default the truth, None where there is no label.
        unreadable: indices of damaged images.
        texts: captions by index; by default one with the colour's name.
    """

    name = "colours"
    fingerprint = "0"

    def __init__(self, shown, labels="shown", unreadable=(), texts=None, class_names=tuple(COLOURS)):
        self.shown = list(shown)
        self.labels = self.shown if labels == "shown" else labels
        self.unreadable = unreadable
        self.texts = texts
        self.class_names = class_names

    def __len__(self):
        return len(self.shown)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise BadSample("unreadable_image", f"picture {index}")
        image = np.broadcast_to(np.array(COLOURS[self.shown[index]], np.uint8), (5, 7, 3)).copy()
        return Record(key=str(index), image=image, captions=self.captions(index), label=self.label(index))

    def captions(self, index):
        return (f"a {self.shown[index]} thing",) if self.texts is None else self.texts[index]

    def label(self, index):
        label = None if self.labels is None else self.labels[index]
        return None if label is None else list(COLOURS).index(label)
