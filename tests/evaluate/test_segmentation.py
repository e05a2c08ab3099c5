"""Segmentation by patch tokens: figures against scikit-learn's, tokens that know all or nothing, the command."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from small_model import SCRIPTS, save_small_model, script_caller

import contrastive
from contrastive.data.record import Record, Source
from contrastive.errors import UserError
from contrastive.evaluate import segmentation
from contrastive.evaluate.dense import patch_centres, patch_counts
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.segmentation import KnnSegmentation, LinearSegmentation, iou_of, segmentation_figures, tally
from contrastive.evaluate.suite import task_from

TASKS = pytest.mark.parametrize("kind", [KnnSegmentation, LinearSegmentation])


class Halves(Source):
    """16 px images of 2 x 2 patches, the left or the upper half of another class; class c is painted 20 c."""

    name, masked, mask_names = "halves", True, ("ground", "cat", "dog")

    def __init__(self, number=40, fingerprint="halves", border=False):
        self.number, self.fingerprint, self.border = number, fingerprint, border

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, :8] = 1 + index % 2
        mask = mask.T.copy() if index % 3 else mask
        image = (20 * mask)[..., None].repeat(3, axis=2)
        if self.border:
            mask[7:9] = 255
        return Record(str(index), image, mask=mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("dense") / "final")


@pytest.fixture
def subject(folder, tmp_path):
    """A model, and the data 'halves' and 'more'."""
    sources = {"halves": Halves(), "more": Halves(60, "more"), "border": Halves(60, "border", border=True)}
    loading = {"sources": sources, "device": "cpu", "batch_size": 7}
    return EvaluatedModel("model", contrastive.load(folder), tmp_path, **loading)


def see(monkeypatch, tokens_of):
    monkeypatch.setattr(segmentation, "to_tokens", lambda encoder, subject, pixels: tokens_of(pixels))


def the_class(pixels):
    """(B, 4, 3): 1 for the class that is painted on a patch."""
    return torch.nn.functional.one_hot(patch_centres(pixels[:, 0], 8).long() // 20, 3).float()


@pytest.mark.parametrize("classes", [2, 5])
def test_iou_is_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    truth, said = torch.from_numpy(rng.integers(0, classes, (2, 6, 30, 20)))
    truth[truth == 1] = said[truth == 1]  # a class that is found better
    counted = torch.from_numpy(rng.random((6, 30, 20)) < 0.8)
    tallies = np.stack([tally(*one).numpy() for one in zip(truth, said, counted, strict=True)])
    expected = 100 * jaccard_score(truth[counted], said[counted], average=None)
    np.testing.assert_allclose(iou_of(tallies.sum(axis=0))[:classes], expected)
    figures = segmentation_figures(tallies, tallies, None)
    assert figures["miou"].value == pytest.approx(expected.mean())
    assert figures["pixel_accuracy"].value == pytest.approx(100 * (truth == said)[counted].double().mean().item())
    assert figures["iou_1"].value == pytest.approx(expected[1]) and len(figures) == 3 + classes
    for name in ("miou", "pixel_accuracy", "iou_0"):
        low, high = figures[name].interval
        assert low < figures[name].value < high < low + 20
    guess = torch.full_like(truth, int(torch.bincount(truth[counted]).argmax()))
    best = np.stack([tally(*one).numpy() for one in zip(truth, guess, counted, strict=True)])
    chance = segmentation_figures(best, best, None)
    assert figures["miou"].chance == pytest.approx(chance["miou"].value)
    assert figures["pixel_accuracy"].chance == pytest.approx(chance["pixel_accuracy"].value)


@TASKS
def test_tokens_that_know_the_class_find_every_pixel(kind, subject, monkeypatch):
    see(monkeypatch, the_class)
    outcome = kind("halves").run(subject)
    assert outcome.headline == ("miou", "pixel_accuracy") and set(outcome.figures) == {
        *outcome.headline, "known_patches_miou", "iou_ground", "iou_cat", "iou_dog"
    }  # fmt: skip
    assert all(figure.value == pytest.approx(100) for figure in outcome.figures.values())
    assert outcome.figures["pixel_accuracy"].chance == pytest.approx(50)
    assert outcome.figures["miou"].chance == pytest.approx(50 / 3)
    assert outcome.details["num_train_images"] == outcome.details["num_test_images"] == 20


@TASKS
def test_tokens_that_know_nothing_score_chance(kind, subject, monkeypatch):
    see(monkeypatch, lambda pixels: torch.randn(len(pixels), 4, 6))
    torch.manual_seed(0)
    options = {"k": 200} if kind is KnnSegmentation else {}
    figures = kind("halves", train="more", **options).run(subject).figures
    assert abs(figures["pixel_accuracy"].value - 50) < 12 and figures["miou"].value < 16.7 + 14


@TASKS
def test_nothing_of_the_scored_pictures_is_fitted_on(kind, subject, monkeypatch):
    see(monkeypatch, the_class)
    read, real = [], segmentation.dense_batches

    def watched(of, source, indices, *others):
        read.append((source.name, set(indices.tolist())))
        return real(of, source, indices, *others)

    monkeypatch.setattr(segmentation, "dense_batches", watched)
    kind("halves").run(subject)
    (_, fitted), (_, scored) = read
    assert not fitted & scored and fitted | scored == set(range(40))
    subject.limit = 10
    kind("halves", train="more").run(subject)
    assert [len(indices) for _, indices in read[2:]] == [10, 10]


def test_the_decay_is_chosen_on_other_pictures_of_the_training_part(subject, monkeypatch):
    parts, real = [], segmentation.LogisticProblem

    def watched(tokens, *others):
        parts.append(tokens)
        return real(tokens, *others)

    see(monkeypatch, lambda pixels: the_class(pixels) + torch.rand(len(pixels), 1, 1).expand(-1, -1, 3))
    monkeypatch.setattr(segmentation, "LogisticProblem", watched)
    LinearSegmentation("halves").run(subject)
    assert len(parts[0]) == 64 and len(set((parts[0].sum(dim=1) * 1e4).round().tolist())) == 16  # of 20, 4 patches each


def test_knn_votes_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    tokens, shares = torch.randn(50, 4), torch.rand(50, 3)
    bank = segmentation.Bank(tokens, shares, torch.arange(50), torch.arange(3))
    asked, (score, _) = (
        torch.randn(9, 4),
        KnnSegmentation("x", k=5, temperature=0.2).fit(bank, torch.device("cpu"), False),
    )
    for row, votes in zip(asked, score(asked), strict=True):
        cosines = torch.cosine_similarity(row[None], tokens)
        near = cosines.argsort(descending=True)[:5]
        weights = (cosines[near] / 0.2).exp()
        torch.testing.assert_close(votes, (weights[:, None] * shares[near]).sum(0) / weights.sum())


def test_ignored_pixels_count_nowhere(subject, monkeypatch):
    see(monkeypatch, the_class)
    figures = KnnSegmentation("border").run(subject).figures
    assert "iou_255" not in figures and figures["miou"].value == pytest.approx(100)
    alone = KnnSegmentation("halves", train="more", ignore=(255, 0)).run(subject).figures
    assert set(alone) == {"miou", "pixel_accuracy", "known_patches_miou", "iou_cat", "iou_dog"}


def test_the_bank_is_bounded_and_spread_over_the_pictures(subject, monkeypatch):
    see(monkeypatch, the_class)
    details = KnnSegmentation("halves", patches=20, k=3).run(subject).details
    assert details["num_patches"] == 20 and details["num_train_images"] == 20


def test_counts_of_patches():
    mask = torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[0, 0, 1], mask[0, 3, 4:] = 7, 9
    counts = patch_counts(mask, 2)
    assert counts.shape == (1, 6, 256) and counts[0, :, 7].tolist() == [1, 0, 0, 0, 0, 0]
    assert counts[0, :, 9].tolist() == [0, 0, 0, 0, 0, 2] and counts.sum() == 24
    assert patch_centres(mask, 2).tolist() == [[0, 0, 0, 0, 0, 9]]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"data": "digits:test"}, "digits:test has no masks, which patch kNN segmentation needs: use scenes:masks"),
        ({"data": "halves", "train": "halves"}, "halves is what is scored: give other data"),
        ({"data": "halves", "layer": 9}, "layer 9 is not in an image tower of 1 blocks"),
        ({"data": "halves", "k": 500}, "k = 500 neighbours among 80 patches"),
        ({"data": "halves", "ignore": [0, 1]}, r"all pixels of its masks are \[2\], beside those ignored"),
        ({"data": "halves", "ignore": [300]}, "values of masks go from 0 to 255"),
        ({"data": "halves", "k": 0}, "both have to be positive"),
        ({"data": "halves", "patches": 0}, "patches is 0; use 1 or more"),
    ],
)
def test_what_cannot_be(task, message, subject):
    with pytest.raises(UserError, match=message):
        task_from({"task": "segmentation_knn", **task}, "here").run(subject)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mask_of_another_size_is_told_in_one_line(subject, num_workers):
    class Odd(Halves):
        def __getitem__(self, index):
            return Record("odd.jpg", np.zeros((16, 16, 3), np.uint8), mask=np.zeros((8, 16), np.uint8))

    subject.source("halves")
    subject._sources["halves"], subject.loading["num_workers"] = Odd(), num_workers
    with pytest.raises(UserError, match="^halves: odd.jpg: the mask has 16×8 pixels, its image 16×16; they have to be"):
        KnnSegmentation("halves").run(subject)


def test_the_suite_on_scenes(folder, monkeypatch, capfd, tmp_path):
    evaluate = script_caller("evaluate.py", monkeypatch, capfd)
    suite = SCRIPTS.parent / "configs" / "suites" / "dense.yaml"
    done = evaluate(folder, "--suite", suite, "--limit", 60, "--device", "cpu", "--out", tmp_path / "o", "--no-cache")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "evaluation.json").read_text())["results"]
    figures = [set(result["figures"]) for result in results]
    assert {"miou", "iou_star", "iou_background"} <= figures[0] == figures[1]
    assert {"within_1_patch", "same_patch_on_objects"} <= figures[2] and figures[3] == {"by_attention", "by_text"}
    shown = [figure for result in results for figure in (result["figures"][name] for name in result["headline"])]
    assert all(figure["low"] <= figure["value"] <= figure["high"] and figure["chance"] > 0 for figure in shown)
    assert "IoU star" in (tmp_path / "o" / "evaluation.html").read_text()
    for name in ("html", "md"):
        page = (tmp_path / "o" / f"evaluation.{name}").read_text()
        assert "patch kNN segmentation" in page and "mIoU" in page and "patch tokens, layer -1" in page


def test_one_task_by_flags_needs_no_train(folder, monkeypatch, capfd, tmp_path):
    evaluate = script_caller("evaluate.py", monkeypatch, capfd)
    call = (folder, "--task", "segmentation_linear", "--limit", 40, "--device", "cpu", "--out", tmp_path / "o")
    assert evaluate(*call, "--data", "scenes:masks", "--option", "layer=0").returncode == 0
    told = evaluate(*call)
    assert told.returncode == 2 and "'data' is missing; give --data SPEC" in told.stderr
