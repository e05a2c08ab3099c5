"""Intervals against resampling the samples themselves, one by one."""

import numpy as np
import pytest

from contrastive.evaluate.tasks import clustered_interval, median_interval, recall_interval, share_interval

RNG = np.random.default_rng(7)


def resampled(statistic, count, times=4000):
    """The percentile interval by drawing samples, as in the textbook."""
    figures = [statistic(RNG.integers(0, count, count)) for _ in range(times)]
    return np.percentile(figures, [2.5, 97.5])


@pytest.mark.parametrize(("count", "right"), [(40, 31), (355, 290), (2000, 20)])
def test_a_share_is_as_by_drawing_samples(count, right):
    hits = np.arange(count) < right
    expected = resampled(lambda rows: 100 * hits[rows].mean(), count)
    found = share_interval(100 * right / count, count)
    assert found == pytest.approx(expected, abs=100 / count + 0.3)
    assert found[0] < 100 * right / count < found[1]


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_where_all_samples_agree_there_is_nothing_to_draw(percent):
    assert share_interval(percent, 50) == (percent, percent)


def test_a_share_covers_the_truth_as_often_as_it_says():
    covered = 0
    for right in RNG.binomial(300, 0.7, 500):
        low, high = share_interval(100 * right / 300, 300)
        covered += low <= 70 <= high
    assert 0.92 <= covered / 500 <= 0.98


def test_recall_is_as_by_drawing_samples():
    labels = np.repeat(np.arange(5), [60, 30, 10, 4, 0])
    hits = RNG.random(len(labels)) < np.array([0.9, 0.5, 0.7, 0.5, 0])[labels]

    def recall(rows):
        return 100 * np.mean([hits[rows][labels[rows] == c].mean() for c in np.unique(labels[rows])])

    counts, correct = np.bincount(labels, minlength=5), np.bincount(labels[hits], minlength=5)
    assert recall_interval(correct, counts) == pytest.approx(resampled(recall, len(labels)), abs=1.5)


def test_captions_of_one_image_are_drawn_together():
    image = np.repeat(np.arange(80), 5)
    same = np.repeat(RNG.random(80) < 0.4, 5)  # all five captions of an image fare alike

    def mean(rows):
        return 100 * np.concatenate([same[image == row] for row in rows]).mean()

    shuffled = RNG.permutation(400)
    found = clustered_interval(same[shuffled], image[shuffled] * 3)
    assert found == pytest.approx(resampled(mean, 80, times=1500), abs=2)
    narrow = share_interval(100 * same.mean(), 400)  # as if they were 400 images
    assert 1.8 < (found[1] - found[0]) / (narrow[1] - narrow[0]) < 2.7  # the square root of 5


def test_the_median_is_as_by_drawing_samples():
    ranks = RNG.geometric(0.05, 301)
    found = median_interval(ranks)
    assert found == pytest.approx(resampled(lambda rows: np.median(ranks[rows]), 301), abs=1)
    assert found[0] <= np.median(ranks) <= found[1]


def test_the_same_figures_have_the_same_interval():
    assert share_interval(61.3, 700) == share_interval(61.3, 700)
    assert median_interval(np.arange(99)) == median_interval(np.arange(99))
