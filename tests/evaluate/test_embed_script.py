"""scripts/embed.py on a real, untrained model and real sources."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colour_model import ColourSource
from PIL import Image
from small_model import save_small_model, script_caller

import contrastive
from contrastive.data.sources import open_source
from contrastive.evaluate.embedding_writing import has_captions, model_identity
from contrastive.evaluate.embeddings import embed_images
from contrastive.evaluate.evaluated_model import load_embeddings


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("run") / "final")


@pytest.fixture
def embed(monkeypatch, capfd):
    return script_caller("embed.py", monkeypatch, capfd)


def test_images_and_captions_of_scenes(embed, model_folder, tmp_path):
    call = (model_folder, "scenes:val", tmp_path / "out", "--limit", 90, "--samples-per-shard", 40, "--device", "cpu")
    done = embed(*call)
    assert done.returncode == 0, done.stderr
    assert "90 images embedded" in done.stderr and "texts embedded" in done.stderr
    names = [f"{part}-0000{n}.parquet" for part in ("images", "texts") for n in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", *names]
    bundle, source = contrastive.load(model_folder), open_source("scenes:val")
    found = load_embeddings(tmp_path / "out", model_identity(bundle), source, parts=("images", "texts"))
    expected = embed_images(bundle.model, source, bundle.preprocess, indices=found.index, device="cpu")
    torch.testing.assert_close(found.features, expected.features)
    first = found.index[0].item()
    assert found.texts.texts[: (found.texts.row == 0).sum()] == source.captions(first)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert embed(*call).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_labelled_images_whose_bad_ones_are_told(embed, model_folder, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
            picture.save(tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures" / "dog" / "1.png").write_bytes(b"no picture")
    flags = ("--files", "npy", "--dtype", "float16", "--space", "pooled", "--precision", "bf16", "--device", "cpu")
    done = embed(model_folder, tmp_path / "pictures", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "1 images left out for unreadable_image: dog/1.png" in done.stderr.replace("\n", " ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["images"] == {"embeddings": 5, "left_out": {"unreadable_image": ["dog/1.png"]}}
    assert config["data"]["class_names"] == ["cat", "dog"] and not config["options"]["normalized"]
    rows = pq.read_table(tmp_path / "out" / "images-00000.parquet").to_pydict()
    assert rows["label"] == [0, 0, 0, 1, 1] and rows["key"][-1] == "dog/2.png"
    features = np.load(tmp_path / "out" / "images-00000.npy")
    assert features.shape == (5, 48) and features.dtype == np.float16


def test_for_clip_retrieval_too(embed, model_folder, tmp_path):
    call = (model_folder, "scenes:val", tmp_path / "out", "--limit", 9, "--device", "cpu")
    assert embed(*call).returncode == 0
    done = embed(*call, "--files", "clip-retrieval")  # of what is embedded already
    assert done.returncode == 0 and "9 rows in the layout of clip-retrieval too" in done.stderr
    assert np.load(tmp_path / "out" / "text_emb" / "text_emb_0.npy").shape == (9, 32)
    assert len(load_embeddings(tmp_path / "out").index) == 9
    done = embed(*call, "--files", "clip-retrieval", "--space", "pooled")
    assert done.returncode == 2 and "clip-retrieval searches projected features" in done.stderr


def test_another_model_does_not_go_on_with_the_folder(embed, model_folder, tmp_path):
    other = save_small_model(tmp_path / "other" / "final", seed=1)
    assert embed(model_folder, "digits:test", tmp_path / "out", "--limit", 9, "--device", "cpu").returncode == 0
    before = sorted((tmp_path / "out").iterdir())
    done = embed(other, "digits:test", tmp_path / "out", "--limit", 9, "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "holds embeddings of another model" in done.stderr
    assert sorted((tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "digits:test", "OUT", "--only", "texts"), "digits:test has no captions to embed as texts"),
        (("RUN", "digits:tst", "OUT"), "Did you mean 'test'"),
        (("RUN", "digits", "OUT", "--spac", "pooled"), "Did you mean 'space'"),
        (("RUN", "digits", "OUT", "--samples-per-shard", "0"), "samples_per_shard is 0; it must be above 0"),
        (("/no/such/run", "digits", "OUT"), "/no/such/run"),
        (("RUN", "digits", "RUN"), "holds something else than embeddings; choose another folder"),
        (("RUN", "digits"), "OUT"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(embed, model_folder, tmp_path, arguments, message):
    before = sorted(model_folder.rglob("*"))
    places = {"RUN": model_folder, "OUT": tmp_path / "out"}
    done = embed(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("embed.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert sorted(model_folder.rglob("*")) == before and not (tmp_path / "out").exists()


def test_prompts_of_class_names_are_no_captions():
    assert not has_captions(open_source("digits:test"))
    assert has_captions(open_source("scenes:val"))
    assert has_captions(ColourSource(["red"])) and not has_captions(ColourSource(["red"], texts=[(" ",)]))
