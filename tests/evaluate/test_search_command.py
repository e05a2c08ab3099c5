"""`contrastive search` on a real, untrained model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import save_small_model, script_caller

import contrastive
from contrastive.data.sources import open_source
from contrastive.evaluate.embeddings import embed_images, embed_texts


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("run") / "final")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures without captions or classes, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (100, 80, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def search(monkeypatch, capfd):
    return script_caller("search.py", monkeypatch, capfd)


@pytest.fixture
def embed(monkeypatch, capfd):
    return script_caller("embed.py", monkeypatch, capfd)


def found(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_texts_and_images_as_queries(search, model_folder, photos, tmp_path, embedded):
    page = tmp_path / "page.html"
    call = (model_folder, photos, "a red circle", photos / "3.png", "blue", "--cache", tmp_path / "cache")
    hits = found(search(*call, "--json", "--out", page))
    assert sum(embedded) == 7  # the six that can be read, and the query
    assert [hit["query"] for hit in hits] == ["a red circle"] * 6 + [str(photos / "3.png")] * 6 + ["blue"] * 6
    assert [hit["rank"] for hit in hits] == [*range(1, 7)] * 3
    assert (hits[6]["key"], hits[6]["score"]) == ("3.png", 1.0) and hits[6]["index"] == 3
    bundle, source = contrastive.load(model_folder), open_images_of(photos)
    images = embed_images(bundle.model, source, bundle.preprocess, device="cpu")
    text = embed_texts(bundle.model, bundle.tokenizer, ["blue"], device="cpu")[0]
    scores, order = (images.features @ text).sort(descending=True, stable=True)
    assert [hit["key"] for hit in hits[12:]] == [images.keys[row] for row in order]
    torch.testing.assert_close(torch.tensor([hit["score"] for hit in hits[12:]]), scores, atol=1e-4, rtol=0)

    content = page.read_text()
    assert content.count("<img") == 6 * 3 + 1 and content.count("data:image/jpeg") == 6 * 3 + 1
    assert "http" not in content and "<h2>a red circle</h2>" in content

    embedded.clear()
    again = search(*call, "--top", 2)
    assert again.returncode == 0 and sum(embedded) == 1 and "3.png" in again.stdout  # of the query alone
    assert (model_folder / "search.html").read_text().count("<img") == 2 * 3 + 1
    (model_folder / "search.html").unlink()


def open_images_of(folder):
    from contrastive.data.sources.image_files import open_images

    return open_images([str(folder)])


def test_what_looks_like_markup_or_a_suffix_is_text(search, model_folder, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "[bold] a.png")
    done = search(model_folder, folder, "png", "[/x] a dog", "--out", tmp_path / "page.html", "--cache", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[bold] a.png") == 2 and "[/x] a dog" in done.stdout


def test_over_embeddings_of_this_model_with_the_captions_of_the_data(search, embed, model_folder, tmp_path):
    out = tmp_path / "out"
    assert embed(model_folder, "scenes:val", out, "--limit", 40, "--only", "images").returncode == 0
    hits = found(search(model_folder, out, "a red circle", "--json", "--top", 3))
    source = open_source("scenes:val")
    assert all(hit["text"] == source.captions(hit["index"])[0] for hit in hits) and len(hits) == 3
    assert not (model_folder / "search.html").exists()

    config = json.loads((out / "config.json").read_text())
    config["data"]["fingerprint"] = "0"  # the data are no longer as they were: their embeddings still are
    (out / "config.json").write_text(json.dumps(config))
    done = search(model_folder, out, "a red circle", "--json", "--top", 3, "--out", tmp_path / "page.html")
    assert [hit["key"] for hit in found(done)] == [hit["key"] for hit in hits]
    assert (
        "neither pictures nor captions can be shown" in done.stderr
        and "<img" not in (tmp_path / "page.html").read_text()
    )

    other = save_small_model(tmp_path / "other" / "final", seed=1)
    done = search(other, out, "a red circle")
    assert done.returncode == 2 and "holds embeddings of another model" in done.stderr


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_approximate(search, model_folder, tmp_path, monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.setattr("contrastive.commands.search_command.index_library", lambda: library)
    call = (model_folder, "digits:test", "a red circle", "--json", "--limit", 50, "--cache", tmp_path, "--top", 60)
    exact, done = found(search(*call)), search(*call, "--approximate")
    assert found(done) == exact and len(exact) == 50
    assert f"approximate search through {library}" in done.stderr
    assert len(list(tmp_path.glob(f"*.{library}"))) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("RUN", "scenes:val"), "say what to look for"),
        (("RUN", "scenes:vl", "x"), "Did you mean 'val'"),
        (("RUN", "PHOTOS", "dgo.jpg"), "no image at dgo.jpg: no such file"),
        (("RUN", "PHOTOS", "PHOTOS/bad.png", "--cache", "OUT"), "bad.png: the image cannot be read (unreadable_image)"),
        (("RUN", "PHOTOS", "x", "--top", "0"), "it must be above 0"),
        (("nowhere", "PHOTOS", "x"), "no model at nowhere"),
    ],
)
def test_bad_input_is_one_line(search, model_folder, photos, tmp_path, arguments, told):
    places = {"RUN": model_folder, "PHOTOS": photos, "OUT": tmp_path, "PHOTOS/bad.png": photos / "bad.png"}
    done = search(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2 and done.stdout == "" and told in done.stderr.replace("\n", " "), done.stderr
