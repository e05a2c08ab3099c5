"""Names of figures in words, and reading what evaluations left in a run folder."""

import pytest

from contrastive.results import (
    RecordedFigure,
    figure_title,
    figure_written,
    figures_of_evaluation,
    figures_of_row,
    figures_of_zero_shot,
    key_parts,
)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("acc1", "acc@1"),
        ("k20_acc1", "k=20 acc@1"),
        ("shot5_acc1", "5-shot acc@1"),
        ("heldout_acc1", "held-out acc@1"),
        ("mean_per_class_recall", "mean per-class recall"),
        ("image_to_text_r10", "image → text R@10"),
        ("text_to_image_median_rank", "text → image median rank"),
        ("group_score", "group score"),
        ("known_patches_miou", "known patches mIoU"),
        ("iou_polar_bear", "IoU polar bear"),
    ],
)
def test_a_name_has_one_title(name, title):
    assert figure_title(name) == title


def test_ranks_are_not_percent():
    assert figure_written("acc1", 12.345) == "12.3 %" and figure_written("image_to_text_median_rank", 1234) == "1,234.0"


def test_data_may_hold_slashes_or_be_left_out():
    assert key_parts("zero_shot//data/a:test/acc1") == ("zero-shot", "/data/a:test", "acc1")
    assert key_parts("zero_shot/acc1") == ("zero-shot", "", "acc1")


def test_what_evaluations_leave_is_read():
    row = {"kind": "eval", "step": 9, "retrieval/val/text_to_image_r1": 2.5, "retrieval/val/num_images": 7}
    assert list(figures_of_row(row)) == [RecordedFigure("retrieval", "val", "text_to_image_r1", 2.5)]
    zero_shot = {"data": "digits", "acc1": 50.0, "acc5": 90.0, "chance": 10.0, "num_images": 4}
    assert [(figure.name, figure.chance) for figure in figures_of_zero_shot(zero_shot)] == [
        ("acc1", 10.0),
        ("acc5", None),
    ]
    figure = {"value": 44.0, "low": 41.5, "high": 46.5, "chance": None}
    done = {"task": 0, "headline": ["acc1"], "figures": {"acc1": figure, "acc5": figure}}
    evaluation = {"models": [{}], "tasks": [{"task": "few_shot", "data": "a → b"}], "results": [done, {"task": 0}]}
    assert list(figures_of_evaluation(evaluation)) == [RecordedFigure("few-shot", "a → b", "acc1", 44.0, (41.5, 46.5))]
    assert not list(figures_of_evaluation({**evaluation, "models": [{}, {}]}))
