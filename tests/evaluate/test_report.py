import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from colour_model import COLOURS, ColourSource, bundle

from contrastive.evaluate.report import collect_examples, write_report
from contrastive.evaluate.report_charts import line_chart, short

EVIL = "</style><script>alert(\"x\")</script> & 'quoted'"


class Page(HTMLParser):
    """Tags, attributes and the text a reader sees."""

    VOID = {"meta", "img", "line", "br"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def rows():
    train = [
        {
            "kind": "train",
            "step": step,
            "loss": 5.0 - step / 100,
            "lr": 1e-3,
            "samples_per_second": 250.0,
            "data_wait": 0.04,
            "logit_scale": 10.0,
            "logit_bias": None,
            "grad_norm": 1.0,
        }
        for step in range(1, 101)
    ]
    evaluations = [
        {
            "kind": "eval",
            "step": step,
            "zero_shot/scenes:test/acc1": accuracy,
            "retrieval/../my data/dev_rank-*.tar/image_to_text_r10": 12.5,
            "retrieval/../my data/dev_rank-*.tar/image_to_text_median_rank": rank,
        }
        for step, accuracy, rank in ((25, 40.0, 90.0), (50, 62.5, 7.0), (100, 61.0, 8.5))
    ]
    return train + evaluations


def write(path, **options):
    options = {"title": "a run", "config": {"loss": "sigmoid"}, "metrics": rows(), **options}
    write_report(path / "report.html", **options)
    html = (path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open, "every tag is closed"
    return html, page, re.sub(r"\s+", " ", " | ".join(page.text))


def examples():
    subject = bundle()
    source = ColourSource(list(COLOURS) * 2)
    return collect_examples(subject.model, source, subject.preprocess, subject.tokenizer, torch.device("cpu"), num=4)


def test_shows_figures_curves_and_examples(tmp_path):
    html, page, text = write(
        tmp_path,
        config={"loss": "sigmoid", "model": {"image": {"depth": 12}}, "optimizer": {"lr": 0.00123456}},
        bad_samples={"unreadable_image": 12_000, "empty_caption": 0},
        **examples(),
    )
    assert "4.095 | final loss" in text  # the mean of the steps 81 to 100
    assert "62.5 % | best acc@1 | scenes:test, step 50" in text
    assert "4 % waiting for data" in text
    assert "my data/dev_rank-*.tar | image → text median rank | 8.5 | 7.0 | 50" in text
    titles = [json.loads(found)["steps"] for found in page.attributes("data-hover")]
    assert len(titles) == 6 + 3  # no logit bias was logged
    assert "model.image.depth | 12" in text and "optimizer.lr | 0.00123456" in text
    assert "unreadable image | 12,000" in text
    assert "of 4 pairs of colours." in text and "a red thing" in text and "✓" in text


def test_fetches_nothing_and_says_nothing_of_others(tmp_path):
    html, page, _ = write(tmp_path, **examples())
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert not page.attributes("href") and "url(" not in html and "@import" not in html
    assert not re.findall(r"https?://", html)
    assert len(html) < 500_000


def test_text_of_the_data_is_text_on_the_page(tmp_path):
    shown = examples()
    shown["pairs"] = [(image, EVIL) for image, _ in shown["pairs"]]
    for found in shown["retrievals"]:
        found["caption"] = EVIL
    metrics = [*rows(), {"kind": "eval", "step": 100, f"zero_shot/{EVIL}/acc1": 1.0}]
    html, page, text = write(
        tmp_path, title=EVIL, config={EVIL: {"x": EVIL}}, bad_samples={EVIL: 1}, metrics=metrics, **shown
    )
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert html.count("alert(") > 8 and '<script>alert("x")' not in html
    assert EVIL in page.text


def test_a_run_that_logged_and_evaluated_nothing_still_has_a_report(tmp_path):
    _, _, text = write(tmp_path, metrics=[])
    assert "no step logged" in text and "loss | sigmoid" in text


def test_steps_repeated_by_a_resumed_run_and_broken_numbers(tmp_path):
    again = [{"kind": "train", "step": 100, "loss": 9.0}, {"kind": "train", "step": 101, "loss": math.nan}]
    _, page, _ = write(tmp_path, metrics=rows() + again)
    loss = json.loads(page.attributes("data-hover")[0])
    assert loss["steps"] == list(range(1, 102))
    assert loss["values"][0][-2:] == ["9", "–"]


def test_large_matrices_become_a_picture(tmp_path):
    similarity = np.random.default_rng(0).normal(size=(40, 40))
    _, page, text = write(tmp_path, similarity=similarity)
    assert "40 pairs of held-out data" in text
    assert sum(source.startswith("data:image/png") for source in page.attributes("src")) == 1


def test_a_collapsed_matrix_has_no_right_ones(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    _, _, text = write(tmp_path, similarity=np.ones((3, 3)), pairs=[(image, "same")] * 3)
    assert "nearest for 0 of 3" in text


def test_a_long_run_is_averaged_down():
    steps = list(range(20_000))
    chart = line_chart("loss", steps, {"loss": [1.0] * 10_000 + [3.0] * 10_000}, smooth=True)
    hover = json.loads(Page(chart).attributes("data-hover")[0])
    assert len(hover["steps"]) == 500 and hover["steps"][-1] == 19_999
    assert hover["values"][0][0] == "1" and hover["values"][0][-1] == "3"
    assert len(chart) < 60_000


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [math.nan, math.nan], [0.0, 0.0], [1e-9, 1e9]])
def test_charts_of_odd_values_stay_inside(values):
    chart = line_chart("x", list(range(10, 10 + len(values))), {"x": values})
    assert "nan" not in chart and "inf" not in chart
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", chart):
        assert 0 <= float(x) <= 370 and 0 <= float(y) <= 170


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.2e-5, "1.2e-5"),
        (0.25, "0.25"),
        (-8.0, "-8"),
        (1500, "1,500"),
        (12_345, "12.3k"),
        (2.5e6, "2.5M"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_examples_are_the_models_own_view():
    subject = bundle()
    names = ["red", "green", "blue", "red", "white"] * 3
    source = ColourSource(names, unreadable=(0,), texts=[(f"a {n} thing",) for n in names[:-1]] + [("",)])
    found = collect_examples(subject.model, source, subject.preprocess, subject.tokenizer, "cpu", num=3)
    captions = [caption for _, caption in found["pairs"]]
    assert len(set(captions)) == 3 and found["similarity"].shape == (3, 3)
    np.testing.assert_allclose(found["similarity"].diagonal(), 1, atol=1e-6)
    for image, caption in found["pairs"]:
        assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
        assert tuple(image[0, 0]) == COLOURS[caption.split()[1]]
    for retrieved in found["retrievals"]:
        own = retrieved["images"][retrieved["correct"]]
        assert tuple(own[0, 0]) == COLOURS[retrieved["caption"].split()[1]]
        # Others of the same colour tie with it, and ties go before it.
        shown = [COLOURS[retrieved["caption"].split()[1]] == tuple(image[0, 0]) for image in retrieved["images"]]
        assert shown.index(True) == 0 and retrieved["rank"] == sum(
            retrieved["caption"] == f"a {n} thing" for i, n in enumerate(names) if i != 0
        )


def test_the_right_image_is_shown_even_when_far():
    subject = bundle()
    texts = {0: ("a white thing",)} | {i: ("",) for i in range(1, 30)} | {29: ("a blue thing",)}
    source = ColourSource(["red"] + ["white"] * 28 + ["blue"], texts=texts)
    found = collect_examples(subject.model, source, subject.preprocess, subject.tokenizer, "cpu")
    far = next(r for r in found["retrievals"] if r["caption"] == "a white thing")
    # The blue picture is as far from white as the red one, and the tie counts against the red one.
    assert len(far["images"]) == 6 and far["correct"] == 5 and far["rank"] == 30 and far["gallery"] == 30
    assert far["scores"] == sorted(far["scores"], reverse=True)


def test_a_source_without_captions_has_no_examples():
    subject = bundle()
    source = ColourSource(["red", "blue"], texts=[(), ("  ",)])
    found = collect_examples(subject.model, source, subject.preprocess, subject.tokenizer, "cpu")
    assert found == {"similarity": None, "pairs": [], "retrievals": [], "examples_from": "colours"}
