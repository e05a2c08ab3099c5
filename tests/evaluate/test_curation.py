"""Which images are kept: each rule against the plain way, and the order of the rules."""

import pytest
import torch
import torch.nn.functional as F

from contrastive.evaluate.curation import AGAINST, Rules, among_best, curate, near_earlier, pair_scores
from contrastive.evaluate.embeddings import EmbeddingSet, TextEmbeddings


def around(angles):
    """Unit vectors (N, 2) at these angles, in degrees: the cosine of two is that of their difference."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def images(features, texts=None):
    size = len(features)
    said = dict(name="images", index=torch.arange(size), labels=torch.full((size,), -1), class_names=None, skipped={})
    return EmbeddingSet(features=features, texts=texts, **said)


def captioned(angles, captions):
    """Images at these angles, whose captions (row, angle) are as far from them as their angles say."""
    rows, own = zip(*captions, strict=True)
    texts = TextEmbeddings(around(own), torch.tensor(rows), torch.zeros(len(rows)).long(), ("",) * len(rows))
    return images(around(angles), texts)


def test_a_chain_keeps_every_other_one():
    """5 degrees apart: each is near to the next at 0.99 (8 degrees), not to the one after it."""
    assert near_earlier(around([0, 5, 10, 15, 20]), 0.99).tolist() == [-1, 0, -1, 2, -1]


@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_near_duplicates_are_those_of_the_plain_way(block):
    rows = F.normalize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    kept, expected = [], []
    for row in range(len(rows)):
        twins = [other for other in kept if rows[row] @ rows[other] >= 0.8]
        expected.append(twins[0] if twins else -1)
        kept += [] if twins else [row]
    assert 10 < len(kept) < 190
    assert near_earlier(rows, 0.8, block=block).tolist() == expected


def test_equal_images_are_duplicates_at_one():
    rows = F.normalize(torch.randn(50, 333, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert near_earlier(torch.cat([rows, rows]), 1.0).tolist() == [-1] * 50 + list(range(50))


def test_scores_are_means_over_captions():
    found = captioned([0, 90, 0], [(0, 0), (0, 60), (2, 90)])
    torch.testing.assert_close(pair_scores(found), torch.tensor([0.75, torch.nan, 0.0]), equal_nan=True)


def test_the_best_share_is_of_those_with_a_score_and_ties_go_to_the_first():
    scores = torch.tensor([0.1, 0.5, torch.nan, 0.5, 0.5])
    assert among_best(scores, 0.5, None).tolist() == [False, True, False, True, False]
    assert among_best(scores, None, 0.5).tolist() == [False, True, False, True, True]
    assert among_best(scores, 0.25, 0.1).tolist() == [False, True, False, False, False]
    assert among_best(scores, None, None).all() and not among_best(scores, 1.0, None)[2]


def test_rules_in_their_order():
    """Row 1 is a duplicate of row 0, but of a better score: the score drops 0 first, and 1 stays."""
    found = captioned([0, 1, 2, 90, 180], [(0, 60), (1, 1), (2, 2), (3, 90)])
    result = curate(found, Rules(min_score=0.9, duplicates=0.99, against_above=0.99), {"test": around([30, 91])})
    assert result.dropped == ("score", None, "duplicate", f"{AGAINST} test", "no caption")
    assert result.near.tolist() == [-1, -1, 1, 1, -1] and result.kept.tolist() == [1]
    assert result.rows("score") == [0]
    torch.testing.assert_close(result.cosine[2:4], around([1, 1])[:, 0])


def test_without_rules_all_is_kept_and_images_need_no_captions():
    assert curate(images(around([0, 0])), Rules(), {}).dropped == (None, None)
    assert curate(images(around([0, 0])), Rules(duplicates=0.9), {}).dropped == (None, "duplicate")
