"""What every probe of features refuses, in one line."""

import pytest
import torch
from probe_data import clouds

from contrastive.errors import UserError
from contrastive.evaluate.probe_input import checked_input


def data():
    return [*clouds(60, 8, 3), *clouds(30, 8, 3, seed=1)]


def spoilt(place, value, *, row=4):
    changed = data()
    changed[place] = changed[place].clone()
    changed[place][row] = value
    return changed


SPOILT = {
    "labels below": (spoilt(1, -1), {}, r"training labels go from -1 to 2, but there are 3 classes"),
    "labels above": (data(), {"num_classes": 2}, r"training labels go from 0 to 2, but there are 2 classes"),
    "test labels above": (spoilt(3, 3), {"num_classes": 3}, r"test labels go from 0 to 3.* in 0\.\.2"),
    "class without": (data(), {"num_classes": 4}, r"class 3 has no training samples"),
    "classes without": (data(), {"num_classes": 10}, r"classes 3, 4, 5, 6, 7 have no training samples \(7 of 10\)"),
    "unseen class": (spoilt(3, 3), {}, r"class 3 has no training samples"),
    "nan": (spoilt(0, float("nan")), {}, r"training features hold NaN .* in 1 of 60 rows, first in row 4"),
    "infinite": (spoilt(2, float("inf"), row=7), {}, r"test features hold NaN or infinite .* first in row 7"),
    "widths": ([*data()[:2], torch.ones(30, 9), data()[3]], {}, r"test features are 9 wide, but the training .* 8"),
    "no test": ([*data()[:2], torch.ones(0, 8), data()[3][:0]], {}, r"there are no test samples"),
    "no training": ([torch.ones(0, 8), data()[3][:0], *data()[2:]], {}, r"there are no training samples"),
    "lengths": ([*data()[:3], data()[3][:-1]], {}, r"test features have the shape \(30, 8\) and their labels \(29,\)"),
    "flat": ([data()[0][0], *data()[1:]], {}, r"training features have the shape \(8,\)"),
    "one class": ([data()[0], data()[1] * 0, data()[2], data()[3] * 0], {}, r"1 class; a classifier needs at least"),
    "float labels": ([data()[0], data()[1].float(), *data()[2:]], {}, r"training labels are torch.float32"),
}


@pytest.mark.parametrize("given, options, match", SPOILT.values(), ids=SPOILT)
def test_refuses_in_one_line(given, options, match):
    with pytest.raises(UserError, match=match) as caught:
        checked_input(*given, **options)
    assert "\n" not in str(caught.value)


def test_validation_is_checked_too():
    features, labels = clouds(20, 8, 3, seed=2)
    above = labels.clone().fill_(0).index_fill(0, torch.tensor([3]), 9)
    with pytest.raises(UserError, match="validation features are 7 wide"):
        checked_input(*data(), val=features[:, :7], val_labels=labels)
    with pytest.raises(UserError, match="validation labels go from 0 to 9"):
        checked_input(*data(), val=features, val_labels=above, num_classes=3)
    with pytest.raises(UserError, match="validation features and validation labels go together"):
        checked_input(*data(), val=features)


def test_types():
    train, train_labels, test, test_labels = data()
    found = checked_input(train.half(), train_labels.int(), test.numpy(), test_labels.numpy())
    assert found.train.dtype == found.test.dtype == torch.float32  # those of the training set
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64
    assert found.num_classes == 3
    assert checked_input(train, train_labels, test, test_labels).test.dtype == torch.float64
