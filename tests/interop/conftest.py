import shutil

import pytest
from small_bundles import small_bundle
from transformers_models import save_theirs

from contrastive.files import write_folder
from contrastive.interop.bundle import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small untrained SigLIP model in a folder of ours; not to be changed."""
    folder, bundle = tmp_path_factory.mktemp("run") / "final", small_bundle("siglip")
    weights, preprocess = bundle.model.state_dict(), bundle.preprocess.config
    write_folder(folder, lambda to: save_model(to, weights, bundle.config, preprocess, bundle.tokenizer))
    return folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Small random models of transformers, saved by itself; not to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    for name in ("SiglipModel", "CLIPModel", "Siglip2VisionModel", "CLIPVisionModelWithProjection"):
        save_theirs(folder / name, name)
    return folder


@pytest.fixture
def copied(originals, tmp_path):
    """What copies one of `originals` by its name, to be changed."""
    return lambda name: shutil.copytree(originals / name, tmp_path / name)
