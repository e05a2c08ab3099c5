"""What `contrastive.load` imports, and what it says about a path that is not a model: what may have been meant."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import contrastive
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent, fill_model, tensors_in


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("google/siglip-base-patch16-224", "For the hub: hf-hub:google/siglip-base-patch16-224"),
        ("siglip_vit_b_16", "an architecture: contrastive.create_model"),
        ("runs/mime", "no such file or folder. Did you mean 'mine'"),
        ("runs/mine/notes.txt", "that is a file; give its folder, runs/mine"),
        ("runs/mine", "neither a run"),
        ("runs/zzzzzzz", "no such file or folder$"),
    ],
)
def test_a_path_without_a_model(path, message, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        contrastive.load(path)


def test_our_own_folder_needs_no_other_library(model_folder):
    """Neither the readers of others' formats nor what an export needs is imported for it."""
    code = (
        "import sys, contrastive; bundle = contrastive.load(sys.argv[1]);"
        "names = [name for name in sys.modules if name.startswith('contrastive.interop.')]; print(*sorted(names))"
    )
    done = subprocess.run([sys.executable, "-c", code, model_folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"contrastive.interop.{name}" for name in ("bundle", "loading")]


def test_public_names_are_listed():
    names = {"ImageEncoder", "create_model", "list_models", "load", "load_image_encoder", "losses", "models"}
    assert names == set(contrastive.__all__) == set(dir(contrastive)) - {"__version__"}
    assert all(hasattr(contrastive, name) for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, 'does not fit the model.*Missing key.*"bias"'),
        ({"extra": torch.zeros(1)}, 'does not fit the model.*Unexpected key.*"extra"'),
        ({"bias": torch.zeros(3)}, "does not fit the model.*size mismatch for bias"),
        (None, "cannot read the weights .*w.safetensors"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    model, file = torch.nn.Linear(4, 2), tmp_path / "w.safetensors"
    tensors = model.state_dict() | (change or {})
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    if change is None:
        file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(UserError, match=message) as caught:
        fill_model(model, tensors_in(file), file)
    assert "\n" not in str(caught.value)


def test_an_absent_part_is_false_and_says_so_when_used():
    part = Absent("the vocabulary is missing")
    assert not part
    for use in (lambda: part(["a text"]), lambda: part.config):
        with pytest.raises(UserError, match="the vocabulary is missing"):
            use()
