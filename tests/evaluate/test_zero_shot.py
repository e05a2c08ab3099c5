import numpy as np
import pytest
import torch
from colour_model import COLOURS, ColourSource, bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.evaluate.classification import classification_metrics, zero_shot, zero_shot_classifier

NAMES = tuple(COLOURS)
TEMPLATES = ("a {} thing", "this is {}")


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 60), num_classes=st.integers(1, 30), seed=st.integers(0, 2**20))
def test_agrees_with_sorting_for_any_shape(num, num_classes, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(num, num_classes)), rng.integers(0, num_classes, num)
    metrics, confusion = classification_metrics(torch.tensor(scores), torch.tensor(labels))
    order = np.argsort(-scores, axis=1)
    assert metrics["acc1"] == pytest.approx(100 * np.mean(order[:, 0] == labels))
    if num_classes > 5:
        assert metrics["acc5"] == pytest.approx(100 * np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    else:
        assert "acc5" not in metrics
    recalls = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert metrics["mean_per_class_recall"] == pytest.approx(100 * np.mean(recalls))
    expected = np.zeros((num_classes, num_classes), int)
    np.add.at(expected, (labels, order[:, 0]), 1)
    assert np.array_equal(confusion.numpy(), expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_classifier_that_tells_nothing_apart_scores_nothing(value):
    labels = torch.arange(40) % 8
    metrics, confusion = classification_metrics(torch.full((40, 8), value), labels)
    assert metrics == {"acc1": 0, "acc5": 0, "mean_per_class_recall": 0}
    assert confusion.diagonal().sum() == 0 and confusion.sum() == 40


def test_a_nan_rival_is_not_a_win():
    scores = torch.tensor([[1.0, float("nan"), 0.0]])
    assert classification_metrics(scores, torch.tensor([0]))[0]["acc1"] == 0


def test_recall_weighs_classes_alike_and_leaves_out_those_without_images():
    scores = torch.eye(3)[[0, 0, 0, 0]]
    metrics, confusion = classification_metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert metrics["acc1"] == 75 and metrics["mean_per_class_recall"] == 50
    assert confusion.tolist() == [[3, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_a_class_is_the_renormalised_mean_of_its_unit_text_embeddings():
    model = bundle().model

    def tokenizer(texts):  # as long as the text: the mean must not weigh long vectors more
        return torch.tensor([[len(t), 0, 0] if t.startswith("x") else [0, 1, 0] for t in texts])

    found = zero_shot_classifier(model, tokenizer, ("one", "two"), ("x {} x x x", "{}"), device="cpu")
    half = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([[half, half, 0.0], [half, half, 0.0]]))


def test_a_source_end_to_end():
    shown = ["red", "green", "blue", "yellow", "cyan", "red", "blue", "red"]
    labels = ["red", "green", "blue", "yellow", "yellow", "red", None, "red"]
    source = ColourSource(shown, labels=labels, unreadable=(5,))
    source.heldout_labels = frozenset({NAMES.index("yellow"), NAMES.index("white")})
    result = zero_shot(bundle(), source, device="cpu", templates=TEMPLATES, batch_size=3)
    assert result["num_images"] == 6 and result["skipped"] == {"unreadable_image": 1, "missing_label": 1}
    assert result["acc1"] == pytest.approx(100 * 5 / 6)
    assert result["mean_per_class_recall"] == pytest.approx(100 * 3.5 / 4)
    assert result["seen_acc1"] == 100 and result["heldout_acc1"] == 50
    assert result["chance"] == pytest.approx(100 / 6)
    assert result["missing_classes"] == ["cyan", "white"]
    assert result["per_class_recall"] == [100, 100, 100, 50, None, None]
    assert result["confusion"][NAMES.index("yellow")][NAMES.index("cyan")] == 1
    assert result["templates"] == list(TEMPLATES) and result["class_names"] == list(NAMES)


def test_a_collapsed_model_scores_at_most_chance():
    source = ColourSource(list(NAMES) * 3)
    result = zero_shot(bundle(collapsed=True), source, device="cpu", templates=TEMPLATES)
    assert result["acc1"] <= result["chance"]


def test_a_limit_takes_a_subset():
    source = ColourSource(list(NAMES) * 10)
    assert zero_shot(bundle(), source, device="cpu", templates=TEMPLATES, limit=7)["num_images"] == 7


@pytest.mark.parametrize(
    ("source", "names", "message"),
    [
        (ColourSource(NAMES, class_names=None), None, "no class names.*--classes.*retrieval"),
        (ColourSource(NAMES, labels=None, class_names=None), NAMES, "no class labels.*retrieval"),
        (ColourSource(NAMES), NAMES[:4], "4 class names given, but colours has 6"),
        (ColourSource(NAMES, class_names=None), NAMES[:4], "labels from 0 to 5, but there are 4"),
        (ColourSource(NAMES), ("red",) * 2 + NAMES[:4], "'red' stands 3 times"),
        (ColourSource(NAMES, unreadable=range(6)), None, "none of its 6 images could be read"),
    ],
)
def test_bad_input_is_one_line(source, names, message):
    with pytest.raises(UserError, match=message) as caught:
        zero_shot(bundle(), source, device="cpu", class_names=names, templates=TEMPLATES)
    assert "\n" not in str(caught.value)
