"""A small untrained model of native images on disk, and pictures of many shapes with labels, captions and masks."""

from dataclasses import replace

import numpy as np
import torch

from contrastive.data.preprocess import PreprocessOptions
from contrastive.data.record import Record, Source
from contrastive.data.tokenizer import train_bpe
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ModelConfig

PATCH = 8
SIZES = [(32, 32), (16, 120), (90, 20), (40, 56), (130, 24), (24, 24), (20, 160), (64, 48)]
NAMES = ("cat", "dog", "star")


class Shapes(Source):
    """Noise of 8 shapes; class c is brighter by 30 c, and so is what its mask says."""

    class_names, masked, mask_names = NAMES, True, ("ground", *NAMES)

    def __init__(self, name="shapes"):
        self.name = self.fingerprint = name

    def __len__(self):
        return 24

    def label(self, index):
        return index % 3

    def captions(self, index):
        return (f"a {NAMES[index % 3]}", f"one {NAMES[index % 3]} of many")

    def __getitem__(self, index):
        height, width = SIZES[index % len(SIZES)]
        image = np.random.default_rng([len(self.name), index]).integers(0, 150, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 1 + index % 3
        image[: height // 2] += np.uint8(30 * mask[0, 0])
        return Record(f"{index:02d}", image, self.captions(index), self.label(index), mask=mask)


def save_native(folder, classifier=False, patches=None, native=True, **tower):
    """Write a model of patches of 8 px with an attention head; or a classifier, or one of squares.

    patches: of an image at most; None: 16.
    """
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
    tokenizer = train_bpe([f"a {name} one of many photo" for name in NAMES] * 4, vocab_size=290, context_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id")}
    config = ModelConfig(embed_dim=32)
    image = replace(config.image, native=native, image_size=4 * PATCH, patch_size=PATCH, **size, **tower)
    if classifier:
        config = ClassifierConfig(image, num_classes=3)
    else:
        config = replace(config, image=image, text=replace(config.text, context_length=12, **ids, **size))
    model = (ImageClassifier if classifier else DualEncoder)(config)
    with torch.no_grad():  # biases and positions that are not 0 tell more
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options = PreprocessOptions(resize="native" if native else "squash", interpolation="bilinear", patches=patches)
    preprocess = options.at(4 * PATCH, PATCH)
    if classifier:
        write_folder(folder, lambda to: save_model(to, model.state_dict(), config, preprocess, class_names=NAMES))
    else:
        write_folder(folder, lambda to: save_model(to, model.state_dict(), config, preprocess, tokenizer))
    return folder
