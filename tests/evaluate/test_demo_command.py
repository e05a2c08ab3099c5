"""`contrastive demo` up to its page: what it loads, and what it refuses before anything starts."""

import socket
import sys

import pytest
from native_model import save_native
from small_model import save_small_model

from contrastive.commands import demo_command
from contrastive.commands.demo_command import DemoOptions, load, main
from contrastive.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("models") / "mine")


def test_two_models_share_the_images_and_keep_their_embeddings(model, tmp_path):
    other = save_native(tmp_path / "native")
    demo = load(DemoOptions(model=model, images=("digits:test",), beside=other, limit=20, device="cpu"))
    assert [each.name for each in demo.models] == ["mine", "native"]
    assert demo.models[0].source(demo.data) is demo.models[1].source(demo.data) is demo.known
    shown, _, line = demo.found("a cat")
    assert len(shown[1]) == 12 and "of 20 images" in line
    kept = [next((folder / "embeddings").glob("digits-test-*")) for folder in (model, other)]
    with pytest.raises(UserError, match="holds embeddings, which cannot be shown"):
        load(DemoOptions(model=model, images=(str(kept[0]),), device="cpu"))


def test_without_images_there_is_nothing_to_search(model):
    demo = load(DemoOptions(model=model, device="cpu"))
    assert demo.data is None and "Start the demo with images" in demo.found("a cat")[2]


def test_refused_before_anything_starts(model, tmp_path, free_port, monkeypatch):
    classifier = save_native(tmp_path / "classifier", classifier=True)
    monkeypatch.setattr(demo_command, "FIRST_PORT", free_port)
    for words, told in (
        ([model, "--limit", "3"], "--limit is of IMAGES, and there are none"),
        ([model, "--beside", model], "the same model is given twice"),
        ([model, "--share"], "unknown flag --share"),
        ([model, "--templates", "fotos"], "no prompt templates .fotos."),
        ([model, tmp_path], "no images in this folder"),
        ([classifier], "has no text tower: it cannot be asked in words"),
    ):
        with pytest.raises(UserError, match=told):
            main([str(word) for word in words])
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(UserError, match=f"port {free_port} is taken"):
        main([str(model), "--port", str(free_port)])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the page needs gradio, .* pip install 'contrastive\[demo\]'"):
        main([str(model)])
