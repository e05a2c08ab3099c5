"""A model folder of ours, loaded where torch, numpy, pillow, safetensors and tokenizers are all that is installed."""

import json
import re
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions, requires

import numpy as np
import torch
from PIL import Image
from small_bundles import small_bundle

import contrastive
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model

FEW = {"torch", "numpy", "pillow", "safetensors", "tokenizers"}


def plain(requirement: str) -> str:
    """The name of a distribution as registries compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


INSTALLED = {plain(one.name) for one in distributions()}


def import_names(distributions: set[str]) -> set[str]:
    """What can be imported of these distributions."""
    return {name for name, of in packages_distributions().items() if distributions & set(map(plain, of))}


def with_all_it_brings(distribution: str) -> set[str]:
    found, todo = set(), {distribution}
    while todo:
        found |= todo
        needed = (one for name in todo for one in requires(name) or () if "extra ==" not in one)
        todo = {name for name in map(plain, needed) if name in INSTALLED} - found
    return found


HIDING = """
import json, sys
from PIL import Image

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names or root in known or root[0] == "_":
            return self.finder.find_spec(name, path, target)

_, folder, picture, out, *known = sys.argv
sys.meta_path[:] = map(Only, sys.meta_path)

import contrastive
encoder = contrastive.load_image_encoder(folder, layer=-1)
bundle = contrastive.load(folder)
image = Image.open(picture)
found = [encoder(encoder.preprocess(image)[None]), bundle.model.encode_image(bundle.preprocess(image)[None])]
found += [bundle.model.encode_text(bundle.tokenizer(["a red circle"]))]
json.dump([one.tolist() for one in found], open(out, "w"))
"""


def test_a_model_of_ours_needs_few_packages(tmp_path):
    bundle = small_bundle("siglip")
    write_folder(
        tmp_path / "model",
        lambda folder: save_model(
            folder, bundle.model.state_dict(), bundle.config, bundle.preprocess.config, bundle.tokenizer
        ),
    )
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    known = import_names(set(FEW) | with_all_it_brings("torch"))
    assert "contrastive" not in known and not known & {
        "yaml",
        "rich",
        "torchvision",
        "ftfy",
        "simplejpeg",
        "accelerate",
    }
    places = tmp_path / "model", tmp_path / "noise.png", tmp_path / "out.json"
    subprocess.run([sys.executable, "-c", HIDING, *places, "contrastive", *known], check=True)
    image = Image.open(places[1])
    encoder = contrastive.load_image_encoder(places[0], layer=-1)
    wanted = [encoder(encoder.preprocess(image)[None]), bundle.model.encode_image(bundle.preprocess(image)[None])]
    wanted += [bundle.model.encode_text(bundle.tokenizer(["a red circle"]))]
    found = json.loads(places[2].read_text())
    assert all(torch.equal(torch.tensor(one), other) for one, other in zip(found, wanted, strict=True))
