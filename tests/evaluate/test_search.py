"""The nearest rows, against a full sort; the approximate ones, against the exact."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from contrastive.errors import UserError
from contrastive.evaluate.search import index_library, nearest, nearest_by_index


def unit(count, size, seed=0):
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sorted_whole(queries, rows, count):
    scores, order = (queries @ rows.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :count], order[:, :count]


@pytest.mark.parametrize("block", [1, 7, 40, 1000, 2**24])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_exact_is_a_full_sort_whatever_the_blocks(count, block):
    """Of small whole numbers products are exact, and most cosines are equal: the lower row comes first."""
    generator = torch.Generator().manual_seed(1)
    queries, rows = (torch.randint(-1, 2, (size, 4), generator=generator).float() for size in (9, 101))
    found = nearest(queries, rows, count, block=block)
    scores, order = sorted_whole(queries, rows, count)
    assert torch.equal(found.scores, scores) and torch.equal(found.rows, order)
    assert found.scores.dtype == torch.float32 and (count < 101 or (scores < 0).any())


def test_exact_on_unit_vectors():
    queries, rows = unit(3, 32), unit(500, 32, seed=1)
    found = nearest(queries, rows, 20, block=100)
    scores, order = sorted_whole(queries, rows, 20)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.rows, order)


def test_nothing_to_find():
    assert nearest(unit(3, 4), torch.empty(0, 4), 5).rows.shape == (3, 0)
    assert nearest(torch.empty(0, 4), unit(3, 4), 5).rows.shape == (0, 3)


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_recall_of_the_approximate(library, tmp_path):
    pytest.importorskip(library)
    queries, rows, file = unit(50, 32), unit(3000, 32, seed=1), tmp_path / "graph"
    exact = nearest(queries, rows, 10)
    found = nearest_by_index(queries, rows, 10, library=library, file=file)
    recall = (found.rows[:, :, None] == exact.rows[:, None]).any(-1).float().mean()
    assert recall >= 0.95
    torch.testing.assert_close(found.scores, (queries[:, None] * rows[found.rows]).sum(-1))
    assert (found.scores.diff(dim=1) <= 0).all()
    written = file.stat().st_mtime_ns
    assert torch.equal(nearest_by_index(queries, rows, 10, library=library, file=file).rows, found.rows)
    assert file.stat().st_mtime_ns == written
    fewer = nearest_by_index(queries, rows[:7], 10, library=library, file=file)  # the file is of other rows
    assert torch.equal(fewer.rows, nearest(queries, rows[:7], 10).rows)


def test_without_a_library(monkeypatch):
    monkeypatch.setattr("contrastive.evaluate.search.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'contrastive\[search\]'"):
        index_library()
    monkeypatch.setattr("contrastive.evaluate.search.find_spec", importlib.util.find_spec)
    assert index_library() in ("faiss", "usearch")
