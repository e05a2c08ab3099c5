"""Labels of tables as people write them: numbers, names, lists; what is none is said."""

import json
import re

import pytest
from refusals import refused
from table_writing import records, written

from contrastive.data.sources import open_source


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([1.0, 0.0, None], [1, 0, None]),
        ([True, False, True], [1, 0, 1]),
        (["10", "2", "1"], [10, 2, 1]),
        (["1.0", "nan", "0"], [1, None, 0]),
        ([3, -1, 0], [3, None, 0]),
    ],
)
def test_whole_numbers_are_labels_however_they_are_written(images, cells, labels):
    source = open_source(records(images, *cells, column="label"))
    assert [source.label(index) for index in range(3)] == labels and source.class_names is None
    rows = "".join(f"{name}.jpg,{'' if cell is None else cell}\n" for name, cell in zip("abc", cells, strict=True))
    source = open_source(written(images, "x.csv", f"image,label\n{rows}"))
    assert [source.label(index) for index in range(3)] == labels


def test_labels_in_text_are_joined_by_name_where_there_are_names(images):
    (images / "classes.json").write_text('["10", "2", "1"]')
    source = open_source(records(images, "1", "10", "2", column="label"), prompts="plain")
    assert [source.label(index) for index in range(3)] == [2, 0, 1] and source.captions(0) == ("1",)
    (images / "classes.json").unlink()
    source = open_source(written(images, "x.csv", "image,label\na.jpg, cat\nb.jpg,cat\nc.jpg,dog \n"))
    assert source.class_names == ("cat", "dog") and source.label(0) == source.label(1) == 0


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (0.5, "column 'label' holds doubles that are no whole numbers"),
        ([0, 1], "column 'label' holds list<item: int64>; a label is one whole number or one text"),
        ({"id": 3}, "column 'label' holds struct<id: int64>"),
        (-1, "column 'label' holds not a single label"),
        ("['cat', 'dog']", "column 'label' holds several labels in a cell, as '['cat', 'dog']'"),
        ("[0, 2]", "column 'label' holds several labels in a cell, as '[0, 2]'"),
    ],
)
def test_what_is_no_label_is_said(images, cell, message):
    refused(records(images, cell, column="label"), re.escape(f"neither captions nor labels: {message}"))
    row = {"image": "a.jpg", "caption": "one", "label": cell}
    source = open_source(written(images, "x.jsonl", json.dumps(row)))
    assert f"no labels: {message}" in source.reading and source.label(0) is None and source.captions(0) == ("one",)


@pytest.mark.parametrize("cells", [("cat|dog", "dog", "ape"), ("cat, dog", "dog", "cat"), ("cat;dog", "cat", "dog")])
def test_several_labels_of_one_image_are_refused(images, cells):
    refused(records(images, *cells, column="label"), re.escape(f"holds several labels in a cell, as '{cells[0]}'"))


@pytest.mark.parametrize("cells", [("tench, Tinca tinca", "missile", "projectile, missile"), ("a;b", "c|d", "e, f")])
def test_names_of_classes_may_hold_separators(images, cells):
    assert open_source(records(images, *cells, column="label")).class_names == tuple(sorted(cells))
