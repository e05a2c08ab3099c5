"""hf-hub: names in both directions, against a local server that speaks as the hub does."""

import json

import huggingface_hub.constants as constants
import pytest
import torch
from hub_server import TOKEN, HubServer
from small_bundles import small_bundle

import contrastive
from contrastive.commands import evaluate_command, zero_shot_command
from contrastive.commands.export_command import main as export_script
from contrastive.errors import UserError
from contrastive.interop.export import export
from contrastive.interop.loading import fetch


@pytest.fixture(autouse=True)
def server(tmp_path, monkeypatch):
    """A hub with nothing in it, and an empty cache."""
    server = HubServer()
    at(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fetch.cache_clear()
    yield server
    server.close()


def at(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def refused(name):
    with pytest.raises(UserError) as caught:
        contrastive.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(first, second):
    first, second = first.model.state_dict(), second.model.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_of_ours_and_nothing_that_could_run(server, model_folder, capfd):
    server.add_folder("me/model", model_folder)
    files = {
        **server.repos["me/model"]["main"],
        "model.py": b"1",
        "pytorch_model.bin": b"2",
        "x/model.safetensors": b"3",
    }
    commit = server.add("me/model", files)
    bundle = contrastive.load("hf-hub:me/model")
    assert same(bundle, contrastive.load(model_folder)) and bundle.tokenizer(["a cat"]).shape == (1, 12)
    assert str(bundle.path) == f"hf-hub:me/model@{commit}" and f"@{commit}" in capfd.readouterr().err
    assert {name.rpartition(".")[2] for name in server.fetched} == {"json", "safetensors"}
    assert "x/model.safetensors" not in server.fetched


def test_only_what_a_model_needs_is_fetched(server, tmp_path):
    export(small_bundle("siglip"), "transformers", tmp_path / "out")
    server.add_folder("me/model", tmp_path / "out")
    needed = {name: content for name, content in server.repos["me/model"]["main"].items() if name != "README.md"}
    others = [
        "checkpoints/step-1/config.json",
        "final/config.json",
        "logs/events.json",
        "data/captions.txt",
        "requirements.txt",
        "sub/spm.model",
        "onnx/config.json",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    server.add("me/model", needed | dict.fromkeys(others, b"{}"))
    contrastive.load("hf-hub:me/model")
    assert set(server.fetched) == needed.keys()
    server.add("me/adapter", {"config.json": b"{}", "adapter_model.safetensors": b"x"})
    assert "has no model.safetensors" in refused("hf-hub:me/adapter")


def test_a_cache_that_cannot_be_written(server, model_folder, tmp_path, monkeypatch):
    server.add_folder("me/model", model_folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert "hf-hub:me/model: cannot write to the cache (" in refused("hf-hub:me/model")


def test_a_revision_is_pinned(server, model_folder, tmp_path):
    old = server.add_folder("me/model", model_folder, "v1")
    server.repos["me/model"][old] = server.repos["me/model"]["v1"]
    other = small_bundle("siglip", seed=1)
    export(other, "transformers", tmp_path / "other")
    server.add_folder("me/model", tmp_path / "other")
    assert same(contrastive.load("hf-hub:me/model@v1"), contrastive.load(model_folder))
    assert same(contrastive.load(f"hf-hub:me/model@{old}"), contrastive.load(model_folder))
    assert same(contrastive.load("hf-hub:me/model"), other)


def test_without_a_network_the_cache_is_used(server, model_folder, monkeypatch):
    commit = server.add_folder("me/model", model_folder)
    contrastive.load("hf-hub:me/model")
    at("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    for name in ("hf-hub:me/model", f"hf-hub:me/model@{commit}"):
        fetch.cache_clear()
        assert same(contrastive.load(name), contrastive.load(model_folder))
    assert "hf-hub:me/other: the hub cannot be reached, and the cache does not have it" in refused("hf-hub:me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached, and the cache does not have it" in refused("hf-hub:me/other")


def test_a_pinned_commit_in_the_cache_asks_nobody(server, model_folder):
    commit = server.add_folder("me/model", model_folder)
    contrastive.load("hf-hub:me/model")
    server.repos.clear()
    fetch.cache_clear()
    assert same(contrastive.load(f"hf-hub:me/model@{commit}"), contrastive.load(model_folder))


def test_weights_held_twice_are_fetched_once(server, tmp_path):
    bundle = small_bundle("clip")
    export(bundle, "open_clip", tmp_path / "out")
    server.add_folder("me/model", tmp_path / "out")
    server.add("me/model", {**server.repos["me/model"]["main"], "model.safetensors": b"for another library"})
    assert same(contrastive.load("hf-hub:me/model"), bundle)
    assert "model.safetensors" not in server.fetched and "open_clip_model.safetensors" in server.fetched


def test_what_cannot_be_fetched_is_told(server, model_folder):
    server.add_folder("me/model", model_folder)
    server.add_folder("me/gated", model_folder)
    server.gated.add("me/gated")
    server.add("me/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    server.add("me/empty", {"README.md": b""})
    for name, message in (
        ("me/nothing", "no such model on the hub, or a private one"),
        ("me/model@v9", "me/model has no branch, tag or commit 'v9'"),
        ("me/gated", "access has to be asked for on its page"),
        ("me/pickle", "has no model.safetensors, only a pickle (pytorch_model.bin)"),
        ("me/empty", "has no model.safetensors: ask its owner"),
        ("model", "a repository of the hub is ORG/NAME"),
        ("me/a--b", "hf-hub:me/a--b: the hub has no such names: Cannot have -- or .."),
        ("me/-a", "the hub has no such names"),
        ("me/a.git", "the hub has no such names"),
    ):
        assert message in refused(f"hf-hub:{name}"), name
    assert server.fetched == []


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
def test_pushed_and_fetched_again(server, model_folder, tmp_path, monkeypatch, capfd, to):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export_script([str(model_folder), "--to", to, str(tmp_path / "out"), "--push", "me/new", "--private"])
    assert f"{server.url}/me/new/commit/" in capfd.readouterr().out
    assert server.private == {"me/new": True}
    pushed = server.repos["me/new"]["main"]
    assert pushed.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert b"me/new" in pushed["README.md"] and str(tmp_path).encode() not in b"".join(pushed.values())
    if to == "open_clip":  # timm looks for its part of the tower where the model is
        described = json.loads(pushed["open_clip_config.json"])
        assert described["model_cfg"]["vision_cfg"]["timm_model_name"] == "hf-hub:me/new"
        assert "hf-hub:me/new" not in (tmp_path / "out" / "open_clip_config.json").read_text()
    assert same(contrastive.load("hf-hub:me/new"), contrastive.load(model_folder))


def test_no_right_to_push(server, model_folder, tmp_path, monkeypatch):
    arguments = [str(model_folder), "--to", "timm", str(tmp_path / "out"), "--push", "me/new"]
    with pytest.raises(
        UserError, match="--push me/new: not logged in to the hub; use `hf auth login`, or set HF_TOKEN"
    ):
        export_script(arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        UserError, match="is written, but not pushed to me/new: the token may not write there.*hf upload"
    ):
        export_script(arguments)
    assert (tmp_path / "out" / "model.safetensors").exists() and server.repos == {}


def test_scripts_take_hub_names(server, model_folder, tmp_path, monkeypatch):
    server.add_folder("me/model", model_folder)
    monkeypatch.chdir(tmp_path)
    zero_shot_command.main(["hf-hub:me/model", "--data", "scenes:test", "--limit", "20", "--device", "cpu"])
    found = json.loads((tmp_path / "evaluations/me-model/zero_shot/scenes-test-limit-20/zero_shot.json").read_text())
    assert found["model"] == "hf-hub:me/model"
    task = ["--task", "zero_shot", "--data", "scenes:test", "--limit", "20", "--device", "cpu"]
    evaluate_command.main(["hf-hub:me/model", *task])
    assert list((tmp_path / "evaluations/me-model/evaluation").glob("*/evaluation.json"))
    assert list((tmp_path / "evaluations/me-model/embeddings").iterdir())
