"""scripts/export.py as a user calls it: each format, refusals, and nothing left behind where it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from launching import ROOT, environment
from rich.console import Console
from small_bundles import small_bundle

import contrastive
from contrastive.commands.export_command import main
from contrastive.errors import UserError
from contrastive.interop.export import export
from contrastive.interop.formats import open_clip_folder as open_clip_writing
from contrastive.interop.formats import transformers_folder as writing
from contrastive.interop.parity import Check, embedding_limit, parity_table
from contrastive.models import ImageModel, ImageModelConfig

LOADED_BY = {"transformers": "AutoModel", "open_clip": "create_model_and_transforms", "timm": "create_model"}


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("to", LOADED_BY)
def test_each_format(model_folder, tmp_path, to, capfd):
    main([str(model_folder), "--to", to, str(tmp_path / "out")])
    printed = capfd.readouterr().out
    assert "image embeddings" in printed and f"wrote {tmp_path / 'out'} for {to}" in printed
    assert ("text embeddings" in printed) == ("logits" in printed) == (to != "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~current_umask()}  # safetensors alone would be the owner's only

    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == to
    assert LOADED_BY[to] in card and str(tmp_path) not in card and "≤ 2e-6" in card


@pytest.mark.parametrize("to", LOADED_BY)
def test_the_code_on_the_card_runs(model_folder, tmp_path, monkeypatch, to):
    """As it stands, from beside the folder; and gives what the model gives."""
    from contrastive.interop.parity import probe_image as picture

    export(model_folder, to, tmp_path / "out")
    picture(60, 44).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(code, names)
    bundle = contrastive.load(model_folder)
    with torch.no_grad():
        from PIL import Image

        pixels = bundle.preprocess(Image.open("photo.jpg"))[None]
        found = bundle.model(pixels, bundle.tokenizer(["a photo of a cat", "a photo of a dog"]))
        if to == "timm":
            expected, actual = found.image, torch.nn.functional.normalize(names["embedding"], dim=-1)
        else:
            logits = found.logit_scale * found.image @ found.text.T + found.logit_bias
            expected, actual = logits.sigmoid(), names["logits"].sigmoid()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)  # Pillow's resize against ours


def test_a_folder_of_one_library_becomes_one_of_another(model_folder, tmp_path):
    export(model_folder, "transformers", tmp_path / "theirs")
    done = export(tmp_path / "theirs", "open_clip", tmp_path / "others")
    assert all(check.passed for check in done.checks)
    first, second = (contrastive.load(place).model.state_dict() for place in (model_folder, tmp_path / "others"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "`theirs`" in (tmp_path / "others" / "README.md").read_text()


def test_a_model_in_training_and_half_precision_is_written_as_it_would_load(tmp_path):
    bundle = small_bundle("siglip")
    bundle.model.train().to(torch.bfloat16)
    export(bundle, "transformers", tmp_path / "out")
    assert bundle.model.training and bundle.model.logit_scale.dtype == torch.bfloat16
    assert contrastive.load(tmp_path / "out").model.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("part", ["image_tower.norm.weight", "text_tower.norm.weight", "logit_scale"])
def test_a_folder_that_says_something_else_is_not_written(model_folder, tmp_path, monkeypatch, part):
    """A writer with a fault: one tensor is a little off."""
    right = writing.weights_of

    def wrong(model):
        weights = right(model)
        return weights | {part: weights[part] * 1.01}

    monkeypatch.setattr(writing, "weights_of", wrong)
    said = refused(model_folder, "--to", "transformers", tmp_path / "out")
    what = {"image": "image embeddings", "text_": "text embeddings", "logit": "logits"}[part[:5]]
    assert re.search(rf"nothing was written: read back by transformers, the {what} are not .*difference \d.*e-\d", said)
    assert list(tmp_path.iterdir()) == []


def test_other_pixels_and_other_ids_are_not_written(model_folder, tmp_path, monkeypatch):
    """A mean that is off, and an end-of-text that is lost: the towers are right, their inputs are not."""
    right = open_clip_writing.outputs

    def off(**changes):
        def outputs(*arguments):
            found = right(*arguments)
            return found.__class__(**{**vars(found), **{name: change(found) for name, change in changes.items()}})

        return outputs

    monkeypatch.setattr(open_clip_writing, "outputs", off(pixels=lambda found: found.pixels + 0.1))
    assert "the pixels are not the model's" in refused(model_folder, "--to", "open_clip", tmp_path / "out")
    monkeypatch.setattr(open_clip_writing, "outputs", off(tokens=lambda found: found.tokens.clamp(min=2)))
    assert "the tokens are not the model's (ids that differ" in refused(
        model_folder, "--to", "open_clip", tmp_path / "out"
    )
    monkeypatch.setattr(open_clip_writing, "outputs", off(image=lambda found: found.image * float("nan")))
    assert "image embeddings are not" in refused(model_folder, "--to", "open_clip", tmp_path / "out")
    monkeypatch.setattr(open_clip_writing, "outputs", off(image=lambda found: None, text=lambda found: None))
    assert "gave no embeddings" in refused(model_folder, "--to", "open_clip", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for out in ("out", "file"):
        said = refused(model_folder, "--to", "timm", tmp_path / out)
        assert "exists and is not empty; nothing is overwritten" in said
    assert (tmp_path / "out" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    main([str(model_folder), "--to", "timm", str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_places_that_are_no_new_folder(model_folder, tmp_path, monkeypatch):
    """'.' would be renamed away from under the user; links in a circle lead nowhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "me").symlink_to(tmp_path)
    for out, message in (
        (".", "is no name of a folder to be made"),
        ("zz/..", "is no name of a folder to be made"),
        ("circle", "cannot write to circle"),
        ("me", "exists and is not empty"),
    ):
        assert message in refused(model_folder, "--to", "timm", out)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "is the folder that you are in" in refused(model_folder, "--to", "timm", tmp_path / "empty")


def test_a_link_is_followed(model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, to in (("one", "empty"), ("two", "absent/new")):
        (tmp_path / name).symlink_to(tmp_path / to)
        main([str(model_folder), "--to", "timm", str(tmp_path / name)])
        assert (tmp_path / name).is_symlink() and (tmp_path / to / "model.safetensors").exists()


def test_siblings_of_the_folder_stay(model_folder, tmp_path):
    """Whatever they are called."""
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "mine.txt").write_text("kept")
    main([str(model_folder), "--to", "timm", str(tmp_path / "out")])
    assert (tmp_path / ".tmp-out" / "mine.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-out", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "--to", "openclip", "OUT"), "unknown format 'openclip'. Did you mean 'open_clip'?"),
        (("/no/such/run", "--to", "timm", "OUT"), "no model at /no/such/run"),
        (("RUN", "OUT"), "--to FORMAT is missing"),
        (("RUN", "--to", "timm"), "OUT"),
        (("RUN", "--to", "timm", "OUT", "--private"), "--private is of --push"),
        (("RUN", "--to", "timm", "OUT", "--push", "justaname"), "a repository of the hub is ORG/NAME"),
    ],
)
def test_bad_input_is_one_line(model_folder, tmp_path, arguments, message):
    places = {"RUN": model_folder, "OUT": tmp_path / "out"}
    assert message in refused(*(places.get(argument, argument) for argument in arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing(model_folder, tmp_path):
    """SIGTERM while the folder is being written."""
    command = [sys.executable, ROOT / "scripts" / "export.py", model_folder, "--to", "onnx", tmp_path / "out"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".tmp-out-*/out/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any(tmp_path.glob(".tmp-out-*/out/*")), process.communicate()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_the_table_tells_what_failed():
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(parity_table([Check("logits", "max difference", 2.5e-3, 1e-5), Check("a", "cosine", 1.0, 0.99)]))
    assert "2.5e-3" in captured.get() and "≤ 1e-5" in captured.get() and "≥ 0.99" in captured.get()


@pytest.mark.parametrize(
    ("kind", "file", "path", "value", "what"),
    [
        ("siglip", "config.json", ("vision_config", "layer_norm_eps"), 1e-5, "image embeddings are"),
        ("siglip", "config.json", ("text_config", "layer_norm_eps"), 1e-5, "text embeddings are"),
        ("siglip", "preprocessor_config.json", ("image_mean",), [0.49] * 3, "pixels are not the model's .mean differ"),
        ("clip", "preprocessor_config.json", ("image_std",), [0.27] * 3, "pixels are not the model's .mean differ"),
    ],
)
def test_a_small_fault_is_found(kind, file, path, value, what, tmp_path, monkeypatch):
    right = writing.write

    def wrong(bundle, folder, place):
        notes = right(bundle, folder, place)
        options = section = json.loads((folder / file).read_text())
        for name in path[:-1]:
            section = section[name]
        assert section[path[-1]] != value
        section[path[-1]] = value
        (folder / file).write_text(json.dumps(options))
        return notes

    monkeypatch.setattr(writing, "write", wrong)
    with pytest.raises(UserError, match=what):
        export(small_bundle(kind), "transformers", tmp_path / "out")


@pytest.mark.parametrize(("depth", "limit"), [(1, 2e-6), (12, 4e-6), (27, 8e-6), (60, 1e-5)])
def test_the_limit_grows_with_depth(depth, limit):
    bundle = small_bundle("image")
    config = ImageModelConfig(32, replace(bundle.config.image, depth=depth))
    assert embedding_limit(replace(bundle, model=ImageModel(config))) == pytest.approx(limit)


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
