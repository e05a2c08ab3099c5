"""scripts/visualize.py on small untrained models: what it writes, what it leaves out, what it refuses."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from towers import call_visualize, save_dual, save_plain

import contrastive
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.interop.bundle import Absent
from contrastive.visualize.pictured_model import read_inputs

WITHOUT_TEXT = {
    "attention",
    "attention_query",
    "attention_rollout",
    "patch_colours",
    "patch_values",
    "embeddings",
    "positions",
    "filter_components",
    "filters",
}
WITH_TEXT = {"text_patches", "text_patches_difference", "image_text"}


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return save_dual(tmp_path_factory.mktemp("dual") / "final", "attention", bias=-3.0)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def visualize(monkeypatch, capfd):
    return lambda *arguments: call_visualize(monkeypatch, capfd, *arguments)


def check_folder(folder, expected):
    assert {path.stem for path in folder.glob("*.png")} == expected
    record = json.loads((folder / "pictures.json").read_text())
    assert {name.removesuffix(".png") for name in record["files"]} == expected
    page = (folder / "index.html").read_text()
    embedded = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(data) for _, data in embedded} == {path.read_bytes() for path in folder.glob("*.png")}
    assert all(len(alt) > 30 for alt, _ in embedded)
    assert "<script" not in page and "://" not in page  # nothing is fetched
    return page


def test_data_with_captions(visualize, dual, tmp_path):
    done = visualize(dual, "scenes:test", "--limit", 3, "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count("\n") == 2, done.stderr
    assert done.stderr.startswith("scenes:test: ")  # what was read, before where to look
    page = check_folder(tmp_path / "out", WITHOUT_TEXT | WITH_TEXT)
    assert "Of 3 images," in page and "sigmoid" in page
    assert not {path.name for path in (tmp_path / "out").iterdir()} - {
        "index.html",
        "pictures.json",
        *(f"{name}.png" for name in WITHOUT_TEXT | WITH_TEXT),
    }


@pytest.mark.parametrize("kind", ["class", "average"])
def test_photographs_and_texts(visualize, photos, tmp_path, kind):
    model = save_dual(tmp_path / "model", kind, resize="crop")
    out = tmp_path / "out"
    texts = ("--text", "a <b>red</b> & $blue$ star", "--text", "a circle")
    place = ("--layer", 0, "--query", 2, 1)
    done = visualize(model, photos / "0.png", photos, *texts, *place, "--limit", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    page = check_folder(out, WITHOUT_TEXT | WITH_TEXT)
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; $blue$ star" in page and "<b>red" not in page
    assert "block 1 of 3" in page and "row 2, column 1" in page
    assert "3 images from" in page and "softmax over these texts" in page


def test_a_second_call_replaces_the_first(visualize, dual, photos, tmp_path):
    out = tmp_path / "out"
    assert visualize(dual, photos, "--text", "a", "--text", "b", "--out", out).returncode == 0
    (out / "notes.txt").write_text("mine")
    (out / "other.png").write_text("mine, too")
    done = visualize(dual, photos / "1.png", "--text", "a", "--out", out)
    assert done.returncode == 0
    assert "left out: which patches look more like a text than like the others: one text" in done.stderr
    assert "left out: embeddings of an untrained tower and of this one: one image" in done.stderr
    assert (out / "notes.txt").read_text() == "mine"
    (out / "other.png").unlink()
    page = check_folder(out, (WITHOUT_TEXT | {"text_patches", "image_text"}) - {"embeddings"})
    assert "<h2>Left out</h2>" in page


def test_without_texts(visualize, dual, photos, tmp_path):
    done = visualize(dual, photos, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.count("these images have no texts; give some, as --text 'a red circle'") == 3
    check_folder(tmp_path / "out", WITHOUT_TEXT)


def test_classifier(visualize, photos, tmp_path):
    model = save_plain(tmp_path / "model")
    done = visualize(model, photos, "--out", tmp_path / "out")
    assert done.returncode == 0 and "the model has no text tower" in done.stderr
    check_folder(tmp_path / "out", WITHOUT_TEXT)
    done = visualize(model, photos, "--text", "a dog", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no text tower: leave out --text" in done.stderr


def test_a_model_without_its_tokenizer(visualize, dual, tmp_path, monkeypatch):
    bundle = contrastive.load(dual)
    lacking = replace(bundle, tokenizer=Absent("tokenizer.json is missing"))
    monkeypatch.setattr(contrastive, "load", lambda path, device: lacking)
    done = visualize(dual, "scenes:test", "--limit", 2, "--out", tmp_path / "out")
    assert done.returncode == 0 and "or its folder no tokenizer" in done.stderr
    check_folder(tmp_path / "out", WITHOUT_TEXT)
    done = visualize(dual, "scenes:test", "--text", "a", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.endswith("error: tokenizer.json is missing\n")


def test_bad_images_of_data_are_told_and_left_out(visualize, dual, tmp_path, photos):
    for number in range(5):
        (photos / f"{number}.txt").write_text(f"caption {number}")
    (photos / "2.png").write_bytes(b"no picture")
    done = visualize(dual, photos, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "image 2.png left out (unreadable_image)" in done.stderr.replace("\n", " ")
    assert "Of 4 images" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DUAL", "PHOTOS/no.png"), "no.png: no such file"),
        (("DUAL", "PHOTOS/bad.png"), "bad.png cannot be read as an image (unreadable_image)"),
        (("DUAL", "PHOTOS/notes.txt"), "notes.txt is not an image file"),
        (("DUAL", "PHOTOS/empty"), "no images in this folder"),
        (("DUAL", "scene:test"), "Did you mean 'scenes'"),
        (("DUAL", "scenes:tst"), "Did you mean 'test'"),
        (("DUAL",), "which images?"),
        (("PHOTOS/none", "scenes:test"), "no model at"),
        (("DUAL", "PHOTOS/0.png", "--text", " "), "--text ' ': empty_caption; give words"),
        (("DUAL", "PHOTOS/0.png", "--layer", "3"), "layer 3: the image tower has 3 blocks"),
        (("DUAL", "PHOTOS/0.png", "--query", "0", "3"), "the grid has rows 0 to 2 and columns 0 to 2"),
        (("DUAL", "PHOTOS/0.png", "--limit", "0"), "limit is 0; it must be above 0"),
        (("DUAL", "PHOTOS/0.png", "--txt", "a"), "Did you mean 'text'"),
        (("DUAL", "PHOTOS/0.png", "--out", "PHOTOS"), "holds files that are not of an earlier contrastive visualize"),
        (("DUAL", "PHOTOS/0.png", "--out", "PHOTOS/0.png"), "is a file; give another --out"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(visualize, dual, photos, tmp_path, arguments, message):
    (photos / "bad.png").write_bytes(b"no picture")
    (photos / "notes.txt").write_text("notes")
    (photos / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.replace("DUAL", str(dual)).replace("PHOTOS", str(photos)) for argument in arguments]
    if "--out" not in filled:
        filled += ["--out", tmp_path / "out"]
    done = visualize(*filled)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("visualize.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_cannot_name_files_elsewhere(visualize, dual, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine.png").write_text("mine")
    names = ["../mine.png", str(tmp_path / "mine.png"), "gone.png"]
    (out / "pictures.json").write_text(json.dumps({"format": "contrastive-pictures-1", "files": names}))
    assert visualize(dual, photos / "1.png", "--out", out).returncode == 0
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_inputs_are_what_the_model_sees(photos):
    preprocess = Preprocess(PreprocessConfig(image_size=24, resize="crop"))
    found = read_inputs([str(photos)], preprocess, limit=3)
    assert found.names == ("0.png", "2.png", "4.png") and found.texts == ()
    with Image.open(photos / "2.png") as image:
        assert found.images[1].equal(preprocess.pixels(image))


def test_texts_of_data(tmp_path):
    preprocess = Preprocess(PreprocessConfig(image_size=24))
    scenes = read_inputs(["scenes:test"], preprocess, limit=4)
    assert len(scenes.texts) == 4 and scenes.own == (0, 1, 2, 3) and scenes.texts_of_data
    assert "red circle" in scenes.texts[0]
    digits = read_inputs(["digits:test"], preprocess, limit=4)
    assert len(digits.texts) == 10 and len(set(digits.own)) > 1  # classes, not captions
    asked = read_inputs(["scenes:test"], preprocess, limit=4, texts=["a star", "a star", "a ring"])
    assert asked.texts == ("a star", "a ring") and asked.own == (None,) * 4


def test_real_photographs(visualize, shared_data, dual, tmp_path):
    shard = shared_data / "flickr8k" / "dev-000000.tar"
    done = visualize(dual, shard, "--limit", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "out", WITHOUT_TEXT | WITH_TEXT)
