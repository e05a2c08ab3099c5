"""Questions to a model about one image or one text, and what the demo's page makes of the answers."""

import io
import re
import socket
from pathlib import Path

import pytest
import torch
from interop.small_bundles import small_bundle
from native_model import Shapes
from PIL import Image

from contrastive.commands.demo_command import free_port as port_to_serve
from contrastive.data.sources.image_files import open_images
from contrastive.data.sources.scenes import Scenes
from contrastive.errors import UserError
from contrastive.evaluate.classification import zero_shot_classifier
from contrastive.evaluate.demo_page import (
    ALONE,
    FITTING,
    WITHIN,
    Demo,
    facts_of,
    found_images,
    label_scores,
    labels_in,
    trained_on,
)
from contrastive.evaluate.evaluated_model import EvaluatedModel

LABELS = ("cat", "dog", "blue star")
DATA = "shapes"


def png(size=(40, 24)):
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(file, "PNG")
    return file.getvalue()


def subject(cache, kind="siglip", name="small", **options):
    return EvaluatedModel(name, small_bundle(kind), cache, device="cpu", sources={DATA: Shapes()}, **options)


@pytest.fixture
def demo(tmp_path):
    models = subject(tmp_path), subject(tmp_path, "clip", "<other>")
    return Demo(models, Shapes(), DATA)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png())
    return str(path)


def words(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_labels_stand_one_a_line_or_between_commas():
    assert labels_in(" cat, blue  star\n\ndog;cat,") == ("cat", "blue star", "dog")
    with pytest.raises(UserError, match="type labels"):
        labels_in(" ,\n")


@pytest.mark.parametrize("kind", ["siglip", "clip", "native"])
def test_label_scores_are_those_of_zero_shot_classification(kind):
    bundle, templates = small_bundle(kind), ("a photo of a {}", "{}")
    found = label_scores(bundle, png(), LABELS, templates)
    images = bundle.preprocess.collate([bundle.preprocess(Image.open(io.BytesIO(png())))])
    texts = zero_shot_classifier(bundle.model, bundle.tokenizer, LABELS, templates, device="cpu")
    with torch.no_grad():
        cosines = (bundle.model.encode_image(images) @ texts.T)[0]
        logits = bundle.model.logit_scale.exp() * cosines
    torch.testing.assert_close(found.cosines, cosines)
    torch.testing.assert_close(found.shares, logits.softmax(dim=0))
    if kind == "clip":
        assert found.matches is None
    else:
        torch.testing.assert_close(found.matches, torch.sigmoid(logits + bundle.model.logit_bias.detach()))


def test_images_found_are_the_nearest_and_are_embedded_once(tmp_path, monkeypatch):
    model = subject(tmp_path)
    found = found_images(model, DATA, "a red circle", 5)
    embedded = model.embeddings(DATA).features
    with torch.no_grad():
        cosines = embedded @ model.bundle.model.encode_text(model.bundle.tokenizer("a red circle"))[0]
    assert [one.index for one in found] == cosines.argsort(descending=True)[:5].tolist()
    assert [one.cosine for one in found] == pytest.approx(cosines.sort(descending=True).values[:5].tolist())
    assert found[0].key == f"{found[0].index:02d}"
    later = subject(tmp_path)
    monkeypatch.setattr(later.bundle.model, "encode_image", None)
    assert found_images(later, DATA, "a red circle", 99)[:5] == found


def test_texts_that_cannot_be_asked_for(tmp_path):
    for text, told in ((" ", "type a text"), ("a cat " * 20, "shorten it")):
        with pytest.raises(UserError, match=told):
            found_images(subject(tmp_path), DATA, text, 3)


def test_prompts_fit_what_a_run_was_trained_on(tmp_path, monkeypatch):
    bundle = small_bundle("siglip")
    assert trained_on(bundle).name == ""  # no run
    run = type("Run", (), {"option": lambda self, name: {"data.train": "scenes:train"}[name]})()
    monkeypatch.setattr("contrastive.evaluate.demo_page.RunRecord", type("Of", (), {"of": lambda path: run}))
    demo = Demo((subject(tmp_path),), trained_on(bundle))
    path = tmp_path / "a.png"
    path.write_bytes(png())
    assert "a drawing of a red circle" in demo.labels(str(path), "red circle, blue star", FITTING)
    assert "a bright photo of a red circle" in demo.labels(str(path), "red circle, blue star", "photo")


def test_facts_say_size_input_and_loss():
    assert re.fullmatch(
        r"0\.\d M parameters, 32-pixel images, patches of 8, sigmoid loss", facts_of(small_bundle("siglip"))
    )
    assert "images of any shape, 20 patches of 8 at most, sigmoid" in facts_of(small_bundle("native"))
    assert facts_of(small_bundle("clip")).endswith("softmax loss")


def test_a_word_of_a_longer_sentence_before_it_was_edited_is_the_whole_sentence(demo, image):
    assert "with the whole sentence" in demo.words(image, "a cat", 5, WITHIN)


def test_bars_of_both_models_stand_with_chance_and_are_escaped(demo, image):
    html = demo.labels(image, "cat, <b>dog</b>, ${bird}", FITTING)
    told = words(html.replace("&lt;", "(").replace("&gt;", ")"))
    assert html.count("<table>") == 2 and "<b>" not in html and "(b)dog(/b)" in told
    assert "small" in told and "(other)" in told and "chance, 33.3 %" in told
    shares = [float(share) for share in re.findall(r'<td class="n">([\d.]+) %', html)]
    assert (
        len(shares) == 6 and sum(shares[:3]) == pytest.approx(100, abs=0.2) and shares[:3] == sorted(shares[:3])[::-1]
    )
    assert html.count("<thead>") == 1  # the probability of a match is of the sigmoid loss alone


def test_a_word_is_said_to_be_compared_as_it_is(demo, image):
    whole, within, alone = (demo.words(image, "a blue star", *how) for how in ((-1, WITHIN), (1, WITHIN), (1, ALONE)))
    assert all(html.count("data:image/png;base64,") == 4 for html in (whole, within, alone))
    assert "whole sentence" in whole and "without it" in within and "“blue” as a text of its own" in alone


def test_a_search_gives_images_captions_and_places(demo):
    shown, places, line = demo.found("a cat")
    assert len(shown) == len(places) == 2 and "The nearest 12 of 24 images" in line
    picture, caption = shown[0][0]
    height, width, _ = demo.image(places[0][0]).shape
    assert picture.size == (width, height) and re.fullmatch(r"-?0\.\d{3} · \d\d", caption)


def test_a_jpeg_is_taken_as_it_is_stored(tmp_path, monkeypatch):
    Image.linear_gradient("L").save(tmp_path / "a.jpg")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    sources = {"it": open_images([str(tmp_path)]), DATA: Shapes()}
    model = EvaluatedModel("small", small_bundle("siglip"), tmp_path / "kept", device="cpu", sources=sources)
    taken = Path(Demo((model,), Shapes(), "it").any_image())
    assert taken.suffix == ".jpg" and taken.read_bytes() == (tmp_path / "a.jpg").read_bytes()
    assert Demo((model,), Shapes(), DATA).any_image().dtype == "uint8"


def test_mistakes_are_one_line_of_the_page(demo, image, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    asked = {
        "drop an image first": demo.labels(None, "cat", FITTING),
        "the image cannot be read (unreadable image); give another file": demo.labels(str(broken), "cat", FITTING),
        "type labels, as: cat, dog, bird": demo.labels(image, " ", FITTING),
        "type a text first": demo.words(image, "", None, WITHIN),
        "Start the demo with images to search them: contrastive demo MODEL photos/": Demo(
            demo.models, Scenes("test")
        ).found("cat")[2],
    }
    for told, html in asked.items():
        assert words(html) == told and 'class="wrong"' in html


def test_a_port_is_free_or_refused(free_port):
    assert port_to_serve("127.0.0.1", free_port) == free_port
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(UserError, match=f"port {free_port} is taken"):
        port_to_serve("127.0.0.1", free_port)
    with pytest.raises(UserError, match="no page can be served at 192.0.2.1"):
        port_to_serve("192.0.2.1", None)
    with pytest.raises(UserError, match="port is 70000; it must be at most 65535"):
        port_to_serve("127.0.0.1", 70000)
