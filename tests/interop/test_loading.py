"""What `contrastive.load` says about a path that is not a model: what may have been meant."""

import pytest

import contrastive
from contrastive.errors import UserError


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
