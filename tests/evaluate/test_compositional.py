"""Choices between captions, in SugarCrepe's and Winoground's layouts."""

import json

import numpy as np
import pytest
import torch
from colour_model import COLOURS, bundle
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluate.compositional import compositional

NAMES = tuple(COLOURS)


def caption(colour):
    return f"a {colour} thing"


@pytest.fixture
def pictures(tmp_path):
    """A folder with a plain picture of each colour, red.png and so on, and one that is damaged."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (5, 7), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG and then nothing")
    return tmp_path


def write(folder, entries, name="choices.json"):
    text = "\n".join(map(json.dumps, entries)) + "\n\n" if name.endswith("l") else json.dumps(entries)
    (folder / name).write_text(text)
    return folder / name


def one(image, right, *wrong):
    wrong = [caption(colour) for colour in wrong]
    return {
        "filename": f"{image}.png",
        "caption": caption(right),
        "negative_caption": wrong[0] if len(wrong) == 1 else wrong,
    }


def two(image_0, image_1, caption_0, caption_1, **more):
    return {
        "image_0": image_0, "image_1": image_1, "caption_0": caption(caption_0), "caption_1": caption(caption_1), **more
    }  # fmt: skip


def unit(name):
    vector = np.array(COLOURS[name], float)
    return vector / np.linalg.norm(vector)


def score(path, model=None, **options):
    return compositional(model or bundle(), path, device="cpu", **options)


def test_one_image_by_hand(pictures):
    entries = {
        "3": one("red", "red", "blue"),
        "7": one("red", "blue", "red"),
        "8": one("blue", "blue", "cyan"),
        "9": one("green", "green", "green"),  # the same wording twice: a tie
    }
    result = score(write(pictures, entries))
    assert result["hits"].tolist() == [True, False, True, False] and result["hits"].dtype == torch.bool
    assert result["acc1"] == 50 and result["chance"] == {"acc1": 50} and result["num_samples"] == 4
    assert result["skipped"] == {}
    assert score(write(pictures, list(entries.values())))["acc1"] == 50
    assert score(write(pictures, list(entries.values()), "x.jsonl"), batch_size=1)["acc1"] == 50
    json.dumps({name: value for name, value in result.items() if name != "hits"})


def test_several_wrong_captions(pictures):
    entries = [one("red", "red", "blue", "green", "white"), one("red", "yellow", "blue", "red", "green")]
    result = score(write(pictures, entries))
    assert result["hits"].tolist() == [True, False] and result["chance"]["acc1"] == 25
    mixed = score(write(pictures, [*entries, one("red", "red", "blue")]))
    assert mixed["chance"]["acc1"] == pytest.approx(100 * (0.25 + 0.25 + 0.5) / 3)
    assert mixed["hits"].tolist() == [True, False, True]


def test_two_images_agree_with_the_definition(pictures):
    rng = np.random.default_rng(0)
    drawn = [tuple(rng.choice(NAMES, 4)) for _ in range(300)]
    entries = [two(f"{a}.png", f"{b}.png", c, d, id=f"x{i}") for i, (a, b, c, d) in enumerate(drawn)]
    result = score(write(pictures, entries, "x.jsonl"))
    expected = []
    for a, b, c, d in drawn:
        near = [[unit(image) @ unit(text) for text in (c, d)] for image in (a, b)]
        eps = 1e-6  # equal vectors tie, up to the rounding of this test
        text = near[0][0] > near[0][1] + eps and near[1][1] > near[1][0] + eps
        image = near[0][0] > near[1][0] + eps and near[1][1] > near[0][1] + eps
        expected.append([text, image, text and image])
    assert result["hits"].tolist() == expected
    for column, name in enumerate(("text_score", "image_score", "group_score")):
        assert result[name] == pytest.approx(100 * np.mean(expected, axis=0)[column])
        assert 0 < result[name] < 100
    assert result["text_score"] != result["image_score"] != result["group_score"]
    assert result["chance"] == {"text_score": 25, "image_score": 25, "group_score": pytest.approx(100 / 6)}


def test_chance_of_two_images_is_that_of_random_scores():
    own_0, own_1, cross_01, cross_10 = np.random.default_rng(0).random((4, 400_000))
    text, image = (own_0 > cross_01) & (own_1 > cross_10), (own_0 > cross_10) & (own_1 > cross_01)
    assert [100 * hits.mean() for hits in (text, image, text & image)] == pytest.approx([25, 25, 100 / 6], abs=0.3)


def test_agrees_with_clip_benchmark_where_nothing_ties(tmp_path):
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    rng = np.random.default_rng(1)
    vectors = {f"text {number}": rng.integers(0, 256, 3).tolist() for number in range(160)}
    model = bundle()
    model.tokenizer = lambda texts: torch.tensor([vectors[text] for text in texts])
    for number in range(80):
        Image.new("RGB", (8, 8), tuple(rng.integers(0, 256, 3).tolist())).save(tmp_path / f"{number}.png")
    entries, batches = [], []
    for number in range(40):
        images, texts = (2 * number, 2 * number + 1), (f"text {4 * number}", f"text {4 * number + 1}")
        entries.append({"image_0": f"{images[0]}.png", "image_1": f"{images[1]}.png"})
        entries[-1].update(caption_0=texts[0], caption_1=texts[1])
        pixels = [model.preprocess(Image.open(tmp_path / f"{image}.png")) for image in images]
        batches.append((torch.stack(pixels)[None], [texts]))
    model.model.eval()
    found = theirs.evaluate(model.model, batches, model.tokenizer, "cpu", amp=False)
    ours = score(write(tmp_path, entries), model)
    pairs = (("text_score", "text_acc"), ("image_score", "image_acc"), ("group_score", "acc"))
    assert 0 < ours["group_score"] < ours["text_score"]
    assert [ours[a] / 100 for a, _ in pairs] == pytest.approx([found[b] for _, b in pairs], abs=5e-5)
    single = [
        {"filename": e["image_0"], "caption": e["caption_0"], "negative_caption": e["caption_1"]} for e in entries
    ]
    found = theirs.evaluate(model.model, [(b[0][:, 0], b[1]) for b in batches], model.tokenizer, "cpu", amp=False)
    assert score(write(tmp_path, single), model)["acc1"] / 100 == pytest.approx(found["text_acc"], abs=5e-5)


class NanModel(type(bundle().model)):
    def _embed(self, features):
        return torch.full_like(features, float("nan"))


@pytest.mark.parametrize("kind", ["collapsed", "nan"])
def test_a_model_that_tells_nothing_apart_has_nothing_right(pictures, kind):
    model = bundle(collapsed=kind == "collapsed")
    if kind == "nan":
        model.model = NanModel()
    rng = np.random.default_rng(0)
    single = [one(*rng.choice(NAMES, 3)) for _ in range(70)]
    paired = [two(f"{a}.png", f"{b}.png", c, d) for a, b, c, d in rng.choice(NAMES, (70, 4))]
    assert score(write(pictures, single), model, batch_size=3)["acc1"] == 0
    result = score(write(pictures, paired), model, batch_size=3)
    assert result["text_score"] == result["image_score"] == result["group_score"] == 0


def test_what_cannot_be_used_is_left_out_and_told(pictures):
    blank = {**one("red", "red", "blue"), "caption": " "}
    null = {**one("red", "red", "blue"), "negative_caption": None}
    entries = [one("red", "red", "blue"), one("gone", "red", "blue"), one("damaged", "red", "blue"), blank, null]
    result = score(write(pictures, entries))
    assert result["num_samples"] == 1 and result["acc1"] == 100
    assert result["skipped"] == {"missing_caption": 2, "missing_image": 1, "unreadable_image": 1}
    pairs = [two("red", "blue", "red", "blue"), two("red", "gone", "red", "blue"), two("gone", "gone", "red", "blue")]
    result = score(write(pictures, pairs))  # names without an ending, as Winoground's
    assert result["num_samples"] == 1 and result["group_score"] == 100 and result["skipped"] == {"missing_image": 2}
    with pytest.raises(UserError, match="none of its 2 samples can be used .1 missing_caption, 1 missing_image.*"):
        score(write(pictures, [blank, one("gone", "red", "blue")]))


def test_image_root_and_limit(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, [one(name, name, "white") for name in NAMES[:5]])
    with pytest.raises(UserError, match=f"5 missing_image.*sought in {elsewhere}"):
        score(path)
    assert score(path, image_root=pictures)["num_samples"] == 5
    assert score(path, image_root=str(pictures), limit=2)["num_samples"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON text"),
        ("{}", "has no entries"),
        ("[]", "has no entries"),
        ("3", "must be a JSON object of entries by id, or a list"),
        ('{"filename": "a"}', "entry 'filename': must be a JSON object with the fields filename"),
        ('{"0": 3}', "entry '0': must be a JSON object with the fields filename"),
        (json.dumps([{"filename": "a", "captions": "x"}]), "no field 'caption'; it needs .*Did you mean 'captions'"),
        (json.dumps([{"image_0": "a", "caption_0": "x"}]), "no field 'image_1'; it needs image_0"),
        (json.dumps([two("a", "b", "red", "blue"), one("a", "red", "blue")]), "entry '1': no field 'image_0'"),
        ('{"0": %s, "0": %s}' % ((json.dumps(one("a", "red", "blue")),) * 2), "id '0' is there twice"),
        (json.dumps([two("a", "b", "red", "blue", id=4)] * 2), "id '4' is there twice"),
        (json.dumps([{**one("a", "red", "blue"), "caption": 3}]), "have to be texts"),
        (json.dumps([{**one("a", "red", "blue"), "filename": None}]), "have to be texts"),
        (json.dumps([{**one("a", "red", "blue"), "negative_caption": []}]), "is an empty list"),
    ],
)
def test_a_malformed_file_is_one_line(pictures, text, message):
    (pictures / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        score(pictures / "x.json")
    assert "\n" not in str(caught.value) and "x.json" in str(caught.value)


def test_other_bad_input(pictures):
    (pictures / "x.jsonl").write_text(json.dumps(one("red", "red", "blue")) + "\n{\n")
    with pytest.raises(UserError, match="x.jsonl, line 2: not JSON"):
        score(pictures / "x.jsonl")
    with pytest.raises(UserError, match="none.json: No such file"):
        score(pictures / "none.json")
    (pictures / "x.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(UserError, match="not JSON text"):
        score(pictures / "x.json")
    model = bundle()
    model.tokenizer = None
    with pytest.raises(UserError, match="no text tower"):
        score(write(pictures, [one("red", "red", "blue")]), model)
