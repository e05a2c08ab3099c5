import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colour_model import COLOURS, ColourSource, bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate import retrieval as module
from contrastive.evaluate.retrieval import chance_recall, retrieval, retrieval_metrics, retrieval_ranks


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def metrics_of(*given):
    return retrieval_metrics(retrieval_ranks(*given))


def naive(image_features, text_features, text_image):
    """By sorting the whole matrix."""
    scores = (image_features @ text_features.T).numpy()
    owner = text_image.numpy()
    ranked_texts = np.argsort(-scores, axis=1)
    image_ranks = np.array([np.flatnonzero(owner[row] == i)[0] for i, row in enumerate(ranked_texts)])
    ranked_images = np.argsort(-scores.T, axis=1)
    text_ranks = np.array([np.flatnonzero(row == owner[j])[0] for j, row in enumerate(ranked_images)])
    metrics = {}
    for way, ranks, size in (
        ("image_to_text", image_ranks, len(owner)),
        ("text_to_image", text_ranks, len(scores)),
    ):
        for k in (1, 5, 10):
            if k < size:
                metrics[f"{way}_r{k}"] = 100 * np.mean(ranks < k)
        metrics[f"{way}_median_rank"] = np.median(ranks) + 1
    return metrics


@settings(max_examples=40, deadline=None)
@given(
    captions=st.lists(st.integers(1, 5), min_size=2, max_size=40),
    dim=st.integers(2, 16),
    seed=st.integers(0, 2**20),
    block=st.integers(1, 400),
)
def test_agrees_with_sorting_for_any_shape_and_block(captions, dim, seed, block):
    text_image = torch.repeat_interleave(torch.arange(len(captions)), torch.tensor(captions))
    text_image = text_image[torch.randperm(len(text_image), generator=torch.Generator().manual_seed(seed))]
    images, texts = unit(len(captions), dim, seed=seed), unit(len(text_image), dim, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", block)
        found = metrics_of(images, texts, text_image)
    assert found == pytest.approx(naive(images, texts, text_image))


def test_any_caption_of_the_image_is_a_hit():
    images = torch.eye(12)
    texts = torch.cat([torch.eye(12), -torch.eye(12)])  # one right caption and one opposite to the image
    found = metrics_of(images, texts, torch.arange(24) % 12)
    assert found["image_to_text_r1"] == 100
    assert found["text_to_image_r1"] == 50
    assert found["image_to_text_median_rank"] == 1


def test_a_collapsed_model_scores_nothing():
    same = torch.ones(30, 4) / 2
    found = metrics_of(same, same, torch.arange(30))
    assert all(value == 0 for name, value in found.items() if "_r1" in name or "_r5" in name)
    assert found["text_to_image_median_rank"] == 30


def test_nan_features_are_no_hits():
    found = metrics_of(torch.full((12, 4), torch.nan), unit(12, 4), torch.arange(12))
    assert found["image_to_text_r10"] == 0 and found["text_to_image_r10"] == 0


def test_recall_that_takes_in_every_candidate_is_left_out():
    found = metrics_of(unit(5, 4), unit(10, 4, seed=1), torch.arange(10) % 5)
    assert {"image_to_text_r5", "text_to_image_r1"} <= found.keys()
    assert not {"image_to_text_r10", "text_to_image_r5", "text_to_image_r10"} & found.keys()


def test_an_image_without_text_is_an_error():
    with pytest.raises(ValueError, match="at least one text"):
        metrics_of(unit(3, 4), unit(3, 4), torch.tensor([0, 0, 1]))


def test_chance_is_what_random_features_score():
    text_image = torch.repeat_interleave(torch.arange(40), torch.tensor([1, 5] * 20))
    chance = chance_recall(text_image, 40)
    trials = [metrics_of(unit(40, 8, seed=i), unit(120, 8, seed=-i - 1), text_image) for i in range(150)]
    for name, expected in chance.items():
        assert np.mean([trial[name] for trial in trials]) == pytest.approx(expected, rel=0.15)


TEXTS = {
    0: ("a red thing", "red again"),
    1: (" ", "something green"),
    2: ("a blue thing",),
    3: ("",),
    4: ("a white thing",),
}
SHOWN = ["red", "green", "blue", "cyan", "white"]


@pytest.mark.parametrize(("captions", "num_texts"), [("first", 3), ("all", 4)])
def test_a_source_end_to_end(captions, num_texts):
    source = ColourSource(SHOWN, unreadable=(2,), texts=TEXTS)
    result = retrieval(bundle(), source, device="cpu", captions=captions)
    assert result["image_to_text_r1"] == 100 and result["text_to_image_r1"] == 100
    assert result["num_images"] == 3 and result["num_texts"] == num_texts
    assert result["skipped"] == {"unreadable_image": 1, "missing_caption": 1}
    assert result["chance"]["text_to_image_r1"] == pytest.approx(100 / 3)


def test_a_row_for_each_caption_scores_as_a_list_does(tmp_path):
    captions = {name: [f"a {name} thing", f"{name} again"] for name in ("red", "green", "blue")}
    for name in captions:
        Image.new("RGB", (8, 8), COLOURS[name]).save(tmp_path / f"{name}.png")
    rows = [f"{name}.png,{captions[name][turn]}\n" for turn in (0, 1) for name in captions]
    (tmp_path / "rows.csv").write_text("image,caption\n" + "".join(rows))
    lists = [json.dumps({"image": f"{name}.png", "caption": captions[name]}) + "\n" for name in captions]
    (tmp_path / "lists.jsonl").write_text("".join(lists))
    by_rows, by_lists = (
        retrieval(bundle(), open_source(str(tmp_path / name)), device="cpu", captions="all")
        for name in ("rows.csv", "lists.jsonl")
    )
    assert by_rows == by_lists and by_rows["num_images"] == 3 and by_rows["num_texts"] == 6
    assert by_rows["text_to_image_r1"] == by_rows["image_to_text_r1"] == 100


def test_equal_captions_are_told():
    source = ColourSource(["red", "red", "blue"])
    result = retrieval(bundle(), source, device="cpu")
    assert result["duplicate_texts"] == 1
    assert result["text_to_image_r1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ColourSource(["red", "blue"], texts={0: (), 1: ("",)}), "no captions"),
        (ColourSource(["red", "blue"], unreadable=(1,)), "at least 2 readable"),
    ],
)
def test_nothing_to_retrieve_is_one_line(source, message):
    with pytest.raises(UserError, match=message):
        retrieval(bundle(), source, device="cpu")
