"""Tables as people write them: separators, quotes, encodings, paths, labels and captions of many forms."""

import base64
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused
from table_writing import records, written

from contrastive.data.record import BadSample
from contrastive.data.sources import open_source


def captions(source):
    return [source.captions(index) for index in range(len(source))]


# Separators and quotes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", "filepath\ttitle\na.jpg\tone, two\nb.jpg\tthree\n", "separated by tabs"),
        ("x.csv", "image;caption\na.jpg;one, two\nb.jpg;three\n", "separated by semicolons"),
        ("x.txt", 'image,caption\na.jpg,"one, two"\nb.jpg,three\n', "column 'caption'"),
        ("x.tsv", 'image,caption\na.jpg,"one, two"\nb.jpg,three\n', "separated by commas"),
        ("x.csv", "image_name| caption\na.jpg|one, two\nb.jpg|three\n", "separated by bars"),
        ("x.csv", '\ufeff\n\nimage,caption\r\na.jpg,"one, two"\r\n\r\nb.jpg,three\r\n', "column 'caption'"),
        ("x.csv", 'image,caption,,\na.jpg,"one, two",,\nb.jpg,three,,\n', "column 'caption'"),  # a spreadsheet's
        ("x.csv.gz", 'image,caption\na.jpg,"one, two"\nb.jpg,three\n', "column 'caption'"),
        ("x.tsv.gz", "image\tcaption\na.jpg\tone, two\nb.jpg\tthree\n", "column 'caption'"),
        ("x.jsonl.gz", '{"image":"a.jpg","caption":"one, two"}\n{"image":"b.jpg","caption":"three"}\n', "caption"),
        ("x.ndjson", '{"image":"a.jpg","caption":"one, two"}\n{"image":"b.jpg","caption":"three"}\n', "caption"),
        ("x.json", ' [{"id":1,"image":"a.jpg","caption":"one, two"},\n{"image":"b.jpg","caption":"three"}]', "caption"),
        ("x.json", '{"image":"a.jpg","caption":"one, two"}\n{"image":"b.jpg","caption":"three"}\n', "caption"),
        ("x.json", '{"a.jpg": "one, two",\n "b.jpg": ["three"]}', "column 'caption'"),
        (
            "captions_val2017.json",
            '{"images": [{"id": 7, "file_name": "b.jpg"}, {"id": 5, "file_name": "a.jpg"}], "annotations": '
            '[{"image_id": 5, "id": 1, "caption": "one, two"}, {"image_id": 7, "id": 2, "caption": "three"}]}',
            "column 'caption'",
        ),
        (
            "dataset_flickr8k.json",
            '{"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "one, two", "imgid": 0}]}, '
            '{"filename": "b.jpg", "split": "val", "sentences": [{"raw": "three", "imgid": 1}]}], "dataset": "x"}',
            "column 'sentences'; rows of every 'split' are taken",
        ),
        ("x.csv", "image_name| comment_number| comment\na.jpg|0|one, two\nb.jpg|0|three\n", "'comment'; separated by"),
        ("x.csv", 'filename,raw\na.jpg,"[""one, two""]"\nb.jpg,"[""three""]"\n', "column 'raw'; lists written"),
        ("x.txt", "image\tcaption\na.jpg#0\tone, two\nb.jpg#0\tthree\n", "'#0', '#1', ... taken off the paths"),
        ("x.csv", 'image,caption,Split\na.jpg,"one, two",train\nb.jpg,three,test\n', "rows of every 'Split' are taken"),
    ],
)
def test_tables_by_whatever_name_and_separator(images, name, content, said):
    source = open_source(written(images, name, content))
    assert captions(source) == [("one, two",), ("three",)] and said in source.reading
    assert source[1].image == b"b" and not source.left_aside


def test_a_stray_quote_is_part_of_the_text(images):
    rows = [("caption", "image"), *((f"caption {number}", "abc"[number % 3] + ".jpg") for number in range(10))]
    rows[3], rows[8] = ('"quoted start', "c.jpg"), ('"another', "b.jpg")
    for name, separator in (("x.tsv", "\t"), ("x.csv", ",")):
        source = open_source(written(images, name, "".join(separator.join(row) + "\n" for row in rows)))
        assert "10 rows, 3 images" in source.reading and "quotes as they stand" in source.reading
        assert sorted(sum(captions(source), ())) == sorted(row[0] for row in rows[1:])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"Hello" he said\ta.jpg\n5" screen\tb.jpg\n', ['"Hello" he said', '5" screen']),  # as they stand
        ('"the ""b"" one"\ta.jpg\n"second"\tb.jpg\n', ['the "b" one', "second"]),  # by the rules
        ('"two\nlines"\ta.jpg\n"a\ttab"\tb.jpg\n', ["two\nlines", "a\ttab"]),
        # The rules are kept, but would make one row of three.
        ('"start\ta.jpg\nmiddle\tb.jpg\nend"\tc.jpg\n', ['"start', "middle", 'end"']),
    ],
)
def test_quotes_of_a_tsv(images, content, expected):
    source = open_source(written(images, "x.tsv", "caption\timage\n" + content))
    assert [texts[0] for texts in captions(source)] == expected


def test_lines_of_a_csv_that_belong_together(images):
    content = 'image,caption\na.jpg,"one\ntwo, three"\nb.jpg,four\n'
    assert captions(open_source(written(images, "x.csv", content))) == [("one\ntwo, three",), ("four",)]
    loose = 'image,caption\na.jpg,"one" said she\nb.jpg,"one, two"\n'  # a line that is a row to every reader
    assert captions(open_source(written(images, "x.csv", loose))) == [("one said she",), ("one, two",)]
    refused(written(images, "x.csv", loose + 'c.jpg,"one" said "she, so"\n'), "1 of 3 rows have another number")
    broken = 'image,caption\na.jpg,"one, two"\nb.jpg,"three\nc.jpg,"four"\n'
    refused(
        written(images, "x.csv", broken), "x.csv, line 4 .*: cannot be read as csv: a value that begins with a quote"
    )


def test_rows_of_another_width_are_counted_with_their_lines_or_refused(images):
    good = "".join(f"{'abc'[number % 3]}.jpg,{number}\n" for number in range(299))
    source = open_source(written(images, "x.csv", f"image,caption\n{good}a.jpg,one,two\nb.jpg\n"))
    assert sum(map(len, captions(source))) == 299
    [(reason, found)] = source.left_aside.items()
    assert reason == "rows of another number of columns" and found["count"] == 2
    assert found["keys"] == ["line 301: 3, not 2", "line 302: 1, not 2"]
    message = (
        r"1 of 2 rows have another number of columns than the header's 2, first line 3: 3, not 2 \(separated by tabs\)"
    )
    refused(written(images, "x.tsv", "image\tcaption\na.jpg\tx\nb.jpg\ty\tz\n"), message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "image,caption\na.jpg,one\n".encode("utf-16"), "is UTF-16 text; write it as UTF-8"),
        ("x.tsv", "image\tcaption\na.jpg\tone\n".encode("utf-16-le"), "is UTF-16 text"),
        ("x.jsonl", '{"image": "a.jpg", "caption": "x"}\n'.encode("utf-16"), "is UTF-16 text"),
        ("x.csv", gzip.compress(b"image,caption\na.jpg,one\n", mtime=0), "is no text, but gzip: name it .gz"),
        ("x.csv", b"PK\x03\x04 and so on", "is no text, but a workbook or .zip"),
        (
            "x.json",
            b'["a.jpg", "b.jpg"]',
            "cannot be read as json .*; JSON is read as a list of records, or as",
        ),
        (
            "x.json",
            b'[{"image": "a.jpg", "caption": "x"}',
            "cannot be read as json .*; JSON is read as a list of records",
        ),
        (
            "x.json",
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}',
            "cannot be read as json .*'file_name'.*; JSON is read as a list of records",
        ),
        ("x.txt", b"a.jpg#0\tone\na.jpg#1\ttwo\n", "among the columns a.jpg#0, one; the first line has to name"),
        ("x.csv", b"photo:alt\na.jpg:x\n", "tried as separators: commas, tabs, semicolons, bars"),
        (
            "x.csv",
            b"image,alt,width\na.jpg,x,3\n",
            r"are image \(text\), alt \(text\), width \(numbers\); name",
        ),
    ],
)
def test_what_a_file_is_instead_is_said(images, name, content, message):
    refused(written(images, name, content), message)


# Paths


def test_a_column_of_paths_comes_before_one_of_numbers(images):
    source = open_source(written(images, "x.csv", "image,filepath,title\n17,a.jpg,one\n18,b.jpg,two\n"))
    assert source[1].image == b"b" and source.reading.startswith("image: column 'filepath' (not 'image'), caption")
    for name, row in (("a.jpg", {"image": 17, "file_name": "a.jpg", "caption": 3, "text": "one"}),):
        source = open_source(written(images, "x.jsonl", json.dumps(row)))
        assert source[0].image == name[:1].encode() and captions(source) == [("one",)]
    source = open_source(
        written(images, "x.csv", "image,path,caption,text\na.jpg,b.jpg,one,two\n"), caption_column="text"
    )
    assert source.reading == "image: column 'image' (not 'path'), caption: column 'text'"


def test_backslashes_are_separators_where_nothing_is_there_otherwise(images):
    (images / "deep").mkdir()
    (images / "deep" / "1.jpg").write_bytes(b"deep")
    source = open_source(written(images, "x.csv", "image,caption\ndeep\\0.jpg,gone\ndeep\\1.jpg,one\n"))
    assert source[1].image == b"deep" and "backslashes taken for '/'" in source.reading
    (images / "back\\slash.jpg").write_bytes(b"as it is")
    source = open_source(written(images, "x.csv", "image,caption\nback\\slash.jpg,one\n"))
    assert source[0].image == b"as it is"


def test_a_missing_image_is_told_with_its_path_and_column(images):
    source = open_source(written(images, "x.csv", "filepath,title\na.jpg,one\nsub/gone.jpg,two\n"))
    with pytest.raises(BadSample) as caught:
        source[1]
    assert str(caught.value) == f"missing_image (x.csv:1: column 'filepath', {images}/sub/gone.jpg)"


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("x.jpg", "pictures/x.jpg"),
        ("train/x.jpg", "x.jpg"),
        ("x", "x.png"),
        ("C:\\data\\x.jpg", None),
        ("y.jpg", "../y.jpg"),
    ],
)
def test_a_table_whose_images_are_nowhere_is_refused_with_where_they_are(tmp_path, path, there):
    (tmp_path / "here").mkdir()
    if there:
        (tmp_path / "here" / there).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / there).write_bytes(b"x")
    message = rf"no image is there, of 1 .*: column 'image' has '{re.escape(path)}' \(x.csv:0\), looked"
    end = (
        f"table's folder; there is '{(tmp_path / 'here' / there).resolve()}', where its paths have to lead"
        if there
        else "table's folder$"
    )
    refused(written(tmp_path / "here", "x.csv", f"image,caption\n{path},one\n"), f"{message}.*{end}")


def test_other_things_than_paths_are_refused(images):
    text = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(300)).decode()
    refused(written(images, "x.csv", f"image,caption\n{text},one\n"), "column 'image' holds base64 text; decode it")
    refused(
        written(images, "x.jsonl", json.dumps({"image": ["a.jpg"], "caption": "x"})), "'image' holds list<item: string>"
    )
    refused(
        written(images, "x.jsonl", json.dumps({"image": [255, 216], "caption": "x"})), "'image' holds list<item: int64>"
    )
    packed = {"image": {"bytes": "/9j/4AAQ", "path": "a.jpg"}, "caption": "x"}
    refused(written(images, "x.jsonl", json.dumps(packed)), "'image' holds struct<bytes: string")


# Captions


@pytest.mark.parametrize(
    "cells",
    [
        ['["one", "two"]', '["three"]'],
        ["['one', 'two']", "['three']"],
        [[{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": []}], [{"raw": "three", "tokens": []}]],
        [[{"caption": "one", "id": 1}, {"caption": "two", "id": 2}], [{"caption": "three", "id": 3}]],
        [{"raw": ["one", "two"]}, {"raw": ["three"]}],
    ],
)
def test_captions_in_lists_of_other_forms(images, cells):
    assert captions(open_source(records(images, *cells))) == [("one", "two"), ("three",)]
    if isinstance(cells[0], str):
        quoted = ['"{}"'.format(cell.replace('"', '""')) for cell in cells]
        source = open_source(written(images, "x.csv", f"image,caption\na.jpg,{quoted[0]}\nb.jpg,{quoted[1]}\n"))
        assert captions(source) == [("one", "two"), ("three",)] and "lists written as texts" in source.reading


def test_a_text_in_brackets_is_a_text(images):
    assert captions(open_source(records(images, "[removed]", '["one"]'))) == [("[removed]",), ('["one"]',)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"en": "x", "de": "y"}, "column 'caption' holds struct<en: string, de: string>; captions .*; of a dict raw"),
        ([{"question": "x", "answer": "y"}], "column 'caption' holds list<item: struct<question: string"),
        (7, "column 'caption' holds int64; captions must be texts"),
        ("['one' 'two']", "a list of texts neither as JSON nor as Python"),
        ('["one", 2]', "a list of texts neither as JSON nor as Python"),
    ],
)
def test_captions_that_are_none_are_refused(images, cell, message):
    refused(records(images, cell), message)


def test_numbered_columns_are_captions_where_nothing_else_is(images):
    table = "file_name,caption_0,caption_1\na.jpg,one,two\nb.jpg,three,four\n"
    source = open_source(written(images, "x.csv", table))
    assert captions(source) == [("one", "two"), ("three", "four")] and "'caption_0, caption_1'" in source.reading
    assert captions(open_source(written(images, "x.csv", "image,caption,caption_2\na.jpg,one,two\n"))) == [("one",)]
    assert not open_source(written(images, "x.csv", "image,label,comment\na.jpg,1,none\n")).captioned


# The datasets library


def test_features_of_datasets(tmp_path):
    from datasets import Dataset, Features, Image, List, Value

    cell = {"bytes": b"x", "path": None}

    def saved(features, **columns):
        Dataset.from_dict(columns, features=Features(features)).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    nested = List({"raw": Value("string"), "id": Value("int64")})
    for image in (Image(), Image(decode=False)):
        sentences = [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}]]
        source = open_source(str(saved({"image": image, "sentences": nested}, image=[cell], sentences=sentences)))
        assert source[0].captions == ("one", "two") and source[0].image == b"x"
    several = saved({"image": List(Image()), "text": Value("string")}, image=[[cell]], text=["x"])
    refused(several, "column 'image' holds list<item: struct<bytes: binary")
    (tmp_path / "a.jpg").write_bytes(b"a")
    paths = saved({"image": Value("string"), "text": Value("string")}, image=["../a.jpg"], text=["one"])
    assert open_source(str(paths))[0].image == b"a"
    nowhere = saved({"image": Value("string"), "text": Value("string")}, image=["b.jpg"], text=["one"])
    refused(nowhere, "column 'image' has 'b.jpg' .*looked for as")


def test_translations_in_parquet_are_refused_by_name(tmp_path):
    cells = {"image": [b"x"], "caption": [{"en": "dog", "de": "Hund"}]}
    pq.write_table(pa.table(cells), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", "holds struct<.*>; captions must be .*; of a dict raw or")
