"""The towers as ONNX graphs: every architecture, any batch size, both precisions, nothing of this machine in them."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from native_pictures import pictures
from PIL import Image
from small_bundles import small_bundle

import contrastive
from contrastive.data.preprocess import Preprocess
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.export import export
from contrastive.interop.formats import onnx_example as example
from contrastive.interop.formats import onnx_folder as writing
from contrastive.interop.formats.onnx_folder import ImageGraph, TextGraph, graph_inputs, image_graph, write_graph
from contrastive.interop.parity import probe_image as picture
from contrastive.models import ImageModel


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that gives a kind's bundle and its folder, exported once."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("onnx") / kind
            made[kind] = small_bundle(kind), export(small_bundle(kind), "onnx", folder).folder
        return made[kind]

    return folder_of


def embedded(file, name, values):
    return torch.from_numpy(example.open_graph(file).run(None, {name: values.numpy()})[0])


def inputs(tower, batch):
    """(name of the input, a batch of them)."""
    if tower == "image":
        return "pixels", torch.randn(batch, 3, 32, 32)
    return "tokens", torch.randint(3, 250, (batch, 12))


def check(bundle, tower, file, half=False):
    for batch in (1, 2, 7):
        name, given = inputs(tower, batch)
        with torch.no_grad():
            expected = getattr(bundle.model, f"encode_{tower}")(given)
        found = embedded(file, name, given)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        if half:
            assert torch.cosine_similarity(found, expected).min() > 0.9999
            assert (found - expected).abs().max() > 1e-6  # it is no copy of the other
        else:
            assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "towers"), [("clip", ("image", "text")), ("classifier", ("image",))])
def test_a_folder_for_any_batch_in_both_precisions(exported, kind, towers):
    bundle, folder = exported(kind)
    expected = {f"{tower}_tower{end}.onnx" for tower in towers for end in ("", "_fp16")}
    assert {path.name for path in folder.glob("*.onnx")} == expected
    for tower in towers:
        check(bundle, tower, folder / f"{tower}_tower.onnx")
        check(bundle, tower, folder / f"{tower}_tower_fp16.onnx", half=True)


@pytest.mark.parametrize("kind", ["siglip", "average"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_other_architectures(tmp_path, capfd, kind, tower):
    bundle = small_bundle(kind)
    graph = (ImageGraph if tower == "image" else TextGraph)(bundle.model, torch.float32)
    write_graph(graph, inputs(tower, 2)[1:], tmp_path / "graph.onnx")
    assert capfd.readouterr() == ("", "")  # the exporter likes to talk
    check(bundle, tower, tmp_path / "graph.onnx")


def test_images_of_any_shape(tmp_path):
    """In one session: any number of patches and images, whatever follows an image's own patches."""
    bundle, images = small_bundle("native"), pictures()
    config = replace(small_bundle("image").config, image=replace(bundle.config.image, class_token=True))
    torch.manual_seed(0)
    model = ImageModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_graph(*image_graph(replace(bundle, model=model), torch.float32), tmp_path / "graph.onnx")
    session = example.open_graph(tmp_path / "graph.onnx")
    for some in ([0], [9], list(range(20)), [19, 3, 7]):
        given = bundle.preprocess([images[k] for k in some])
        with torch.no_grad():
            expected = model.encode_image(given)
        inputs = graph_inputs("", given)
        assert np.abs(session.run(None, inputs)[0] - expected.numpy()).max() < 1e-6
        beyond = np.full_like(inputs["pixel_values"], 1e3)
        inputs["pixel_values"] = np.concatenate([inputs["pixel_values"], beyond], axis=1)
        assert np.abs(session.run(None, inputs)[0] - expected.numpy()).max() < 1e-6


def test_the_example_makes_our_patches():
    bundle = small_bundle("native")
    options = json.loads(json.dumps(writing.description_of(bundle)))["preprocess"]
    for image in pictures():
        ours, (values, grid) = bundle.preprocess(image), example.patches(image, options)
        assert values.dtype == np.float32 and grid.dtype == np.int64 and grid.tolist() == ours.grids.tolist()
        assert np.abs(ours.values.numpy() - values).max() < 2.5 / 255 / 0.5


def test_text_is_pooled_where_it_ends(exported):
    """The first of several ends, ends at different places, and no end at all."""
    bundle, folder = exported("clip")
    tokens = torch.randint(3, 250, (4, 12))
    eos = bundle.config.text.eos_id
    tokens[0, 3] = tokens[0, 9] = tokens[1, 11] = tokens[2, 0] = eos
    with torch.no_grad():
        expected = bundle.model.encode_text(tokens)
    assert (embedded(folder / "text_tower.onnx", "tokens", tokens) - expected).abs().max() < 1e-6


def test_a_classifier_has_its_scores_and_their_names(exported):
    bundle, folder = exported("classifier")
    pixels = torch.randn(3, 3, 32, 32)
    names = [output.name for output in example.open_graph(folder / "image_tower.onnx").get_outputs()]
    assert names == ["embeddings", "scores"]
    scores = example.open_graph(folder / "image_tower.onnx").run(["scores"], {"pixels": pixels.numpy()})[0]
    with torch.no_grad():
        assert np.abs(scores - bundle.model.scores(pixels).numpy()).max() < 1e-5
    assert json.loads((folder / "config.json").read_text())["class_names"] == list("abcde")


def test_nothing_of_this_machine_is_written(exported):
    for kind in ("clip", "classifier"):
        for file in exported(kind)[1].rglob("*"):
            found = re.search(rb"[\w./-]*(site-packages|/home/|/tmp/|\.py\")[\w./-]*", file.read_bytes())
            assert found is None, f"{file.name}: {found.group()}"


def test_the_example_does_what_the_model_does(exported, tmp_path):
    bundle, folder = exported("clip")
    image = picture(90, 61)
    image.save(tmp_path / "photo.png")
    texts = ["a red circle", "two dogs"]
    command = [sys.executable, folder / "example.py", tmp_path / "photo.png", *texts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    model = bundle.model
    with torch.no_grad():
        features = model(bundle.preprocess(image)[None], bundle.tokenizer(texts))
        logits = features.logit_scale * features.image @ features.text.T
    assert list(found) == texts
    # Pillow resizes, and not our kernel: a level of 255 here and there.
    assert np.abs(np.array([float(value) for value in found.values()]) - logits[0].numpy()).max() < 0.02


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (33, 33), (31, 200)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cut": "floor"},
        {"short_side": 37},
        {"resize": "squash"},
        {"resize": "squash", "short_side": 37, "interpolation": "bilinear", "cut": "corner"},
    ],
)
def test_the_example_cuts_as_we_do(size, changes):
    bundle = small_bundle("clip")
    bundle = replace(bundle, preprocess=Preprocess(replace(bundle.preprocess.config, **changes)))
    options = json.loads(json.dumps(writing.description_of(bundle)))["preprocess"]
    image = picture(*size)
    ours, theirs = bundle.preprocess(image), example.preprocess(image, options)
    assert theirs.shape == (3, 32, 32) and theirs.dtype == np.float32
    assert np.abs(ours.numpy() - theirs).max() < 2.5 / 255 / 0.26


def test_a_source_without_its_tokenizer_says_so(tmp_path):
    bundle = small_bundle("text")
    bundle = replace(bundle, tokenizer=Absent("no tokenizer here"))
    done = export(bundle, "onnx", tmp_path / "out")
    assert any("no tokenizer.json" in note for note in done.notes)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (
        "This folder has no tokenizer, which its source had not either" in (tmp_path / "out" / "README.md").read_text()
    )


def test_it_is_not_a_model_to_load(exported):
    with pytest.raises(UserError, match="ONNX graphs, which are for onnxruntime alone"):
        contrastive.load(exported("clip")[1])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript, which is not installed: pip install 'contrastive.export.'"):
        export(small_bundle("text"), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_grey_picture_is_taken(exported):
    _, folder = exported("clip")
    options = json.loads((folder / "config.json").read_text())["preprocess"]
    assert example.preprocess(Image.new("L", (7, 9), 200), options).shape == (3, 32, 32)
