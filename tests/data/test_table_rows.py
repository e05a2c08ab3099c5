"""Rows of one image are one sample, in every kind of table."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encode
from PIL import Image
from refusals import refused

from contrastive.data.record import BadSample
from contrastive.data.shards.shard_writing import write_shards
from contrastive.data.sources import column_source, open_source

CAPTIONS = [("a.jpg", "one"), ("b.jpg", "two"), ("a.jpg", "three"), ("b.jpg", "four"), ("c.jpg", "five")]
EXPECTED = [("one", "three"), ("two", "four"), ("five",)]


def read(source):
    return [source.captions(index) for index in range(len(source))]


def written(folder, kind):
    """CAPTIONS as a file or folder of this kind; the images hold their own names."""
    path = folder / f"pairs.{kind}"
    if kind in ("csv", "tsv"):
        rows = [("image", "caption"), *CAPTIONS]
        path.write_text("".join(("," if kind == "csv" else "\t").join(row) + "\n" for row in rows))
    elif kind == "jsonl":
        path.write_text(
            "".join(json.dumps(dict(zip(("image", "caption"), row, strict=True))) + "\n" for row in CAPTIONS)
        )
    else:
        names, captions = zip(*CAPTIONS, strict=True)
        packed = kind.partition("-")[2]
        cells = {
            "": names,
            "bytes": [name[:1].encode() for name in names],
            "struct": [{"bytes": name[:1].encode(), "path": name} for name in names],
            "pathless": [{"bytes": name[:1].encode(), "path": ""} for name in names],
        }[packed]
        table = pa.table({"image": pa.array(cells), "caption": captions})
        if kind.startswith("parquet"):
            path = folder / "pairs.parquet"
            pq.write_table(table, path, row_group_size=2)
        else:
            import datasets

            path = folder / "saved"
            datasets.Dataset(table).save_to_disk(path)
    return str(path)


KINDS = ["csv", "tsv", "jsonl", "parquet", "parquet-bytes", "parquet-struct", "parquet-pathless"]
KINDS += ["saved-bytes", "saved-struct", "saved-pathless"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_are_one_sample(images, kind):
    source = open_source(written(images, kind))
    assert read(source) == EXPECTED and source.reading.endswith("5 rows, 3 images")
    assert [source[index].image for index in range(3)] == [b"a", b"b", b"c"]
    assert [source[index].captions for index in range(3)] == EXPECTED
    assert source[2].key.endswith(":4") and source[0].caption_weights is None


def test_one_path_written_in_several_ways(images):
    rows = ["a.jpg,one", "./a.jpg,two", f"{images}/a.jpg,three", ".//a.jpg,four", "b.jpg,five", f"{images}//b.jpg,six"]
    (images / "x.csv").write_text("\n".join(["image,caption", *rows]))
    assert read(open_source(str(images / "x.csv"))) == [("one", "two", "three", "four"), ("five", "six")]


def test_structs_with_nothing_but_paths(images):
    rows = [{"image": {"bytes": None, "path": f"{name}.jpg"}, "caption": text} for name, text in ("a1", "b2", "a3")]
    (images / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(images / "x.jsonl"))
    assert read(source) == [("1", "3"), ("2",)] and source[1].image == b"b"


def test_rows_without_an_image_stay_apart(images):
    (images / "x.csv").write_text("image,caption\na.jpg,one\n,two\n,three\na.jpg,four\n")
    source = open_source(str(images / "x.csv"))
    assert read(source) == [("one", "four"), ("two",), ("three",)]
    with pytest.raises(BadSample, match=r"missing_image \(x.csv:1: column 'image' is empty"):
        source[1]


def test_rows_of_one_image_in_several_tables(images):
    for number in range(2):
        (images / f"x{number}.csv").write_text(f"image,caption\na.jpg,first {number}\nb.jpg,second {number}\n")
    assert read(open_source(f"{images}/x*.csv")) == [("first 0", "first 1"), ("second 0", "second 1")]
    (images / "deep").mkdir()
    (images / "deep" / "a.jpg").write_bytes(b"another")
    (images / "deep" / "x1.csv").write_text("image,caption\na.jpg,other\n../b.jpg,this\n")
    assert len(open_source(f"{images}/**/x1.csv")) == 4


def test_columns_keep_their_weights_over_rows(images):
    (images / "x.csv").write_text("image,alt,text\na.jpg,one,two\nb.jpg,five,six\na.jpg,three,\na.jpg,,four\n")
    sample = open_source(str(images / "x.csv"), caption_column="alt=1,text=3")[0]
    weights = dict(zip(sample.captions, sample.caption_weights, strict=True))
    assert weights["one"] == weights["three"] == 1 / 3 and weights["two"] == weights["four"] == 1


def test_a_bad_caption_costs_no_more_than_itself(images):
    (images / "x.csv").write_bytes(b"image,caption\na.jpg,good\na.jpg,\xff\xfe\na.jpg,fine\n")
    good, bad, fine = open_source(str(images / "x.csv")).captions(0)
    assert (good, fine) == ("good", "fine")
    with pytest.raises(UnicodeEncodeError):  # what the loader counts as bad_utf8
        bad.encode()


def test_labels_of_one_image_agree(images):
    rows = ["image,caption,label", "a.jpg,one,cat", "b.jpg,two,dog", "a.jpg,three,", "b.jpg,four,dog"]
    (images / "x.csv").write_text("\n".join(rows))
    source = open_source(str(images / "x.csv"))
    assert [source.label(index) for index in range(2)] == [0, 1] and source[1].label == 1
    (images / "x.csv").write_text("\n".join([*rows, "b.jpg,five,cat"]))
    refused(images / "x.csv", "rows of one image have different labels, as x.csv:1, x.csv:3, x.csv:4")


def test_labelled_rows_without_captions_stay_as_they_are(images):
    (images / "x.csv").write_text("image,label\na.jpg,0\na.jpg,1\na.jpg,0\n")
    assert len(open_source(str(images / "x.csv"))) == 3


def test_repeats_change_the_fingerprint_and_nothing_else_does(images):
    import hashlib

    (images / "x.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\n")
    source, digest = open_source(str(images / "x.csv")), hashlib.sha256((images / "x.csv").read_bytes()).hexdigest()
    said = f"x.csv Columns(image='image', caption='caption', label=None) {digest}"
    assert source.fingerprint == hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    (images / "x.csv").write_text("image,caption\na.jpg,one\na.jpg,two\n")
    digest = hashlib.sha256((images / "x.csv").read_bytes()).hexdigest()
    said = f"x.csv Columns(image='image', caption='caption', label=None) {digest}"
    merged = open_source(str(images / "x.csv")).fingerprint
    assert merged != hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def test_same_name_in_other_bytes_is_another_image(images):
    cells = [{"bytes": name, "path": "image.jpg"} for name in (b"a", b"b", b"a")]
    pq.write_table(pa.table({"image": cells, "caption": ["one", "two", "three"]}), images / "x.parquet")
    assert read(open_source(str(images / "x.parquet"))) == [("one", "three"), ("two",)]


def test_a_large_table_is_read_on_only_where_its_start_has_a_pair(monkeypatch):
    monkeypatch.setattr(column_source, "SCAN_BYTES", 10)
    given = []

    def groups(*cells):
        for cell in cells:
            given.append(cell)
            yield pa.array(cell, pa.binary())

    assert column_source.byte_keys(groups([b"12345"], [b"123456"], [b"12345"])) is None and len(given) == 2
    keys = column_source.byte_keys(groups([b"12345", b"12345"], [b"123456"], [b"7"]))
    assert len(keys) == 4 and column_source.rows_by_image(keys)[1].tolist() == [2, 3, 4]


def test_rows_by_image_against_a_loop():
    rng = np.random.default_rng(0)
    keys = [str(key) if key < 30 else None for key in rng.integers(0, 40, 300)]
    groups = {}
    for row, key in enumerate(keys):
        groups.setdefault(key or f"row {row}", []).append(row)
    rows, ends = column_source.rows_by_image(pa.chunked_array([keys[:100], keys[100:]], pa.large_string()))
    assert [part.tolist() for part in np.split(rows, ends[:-1])] == list(groups.values())


def test_shards_of_rows_are_those_of_lists(tmp_path):
    for number in range(4):
        picture = Image.fromarray(np.full((16, 16, 3), 60 * number, np.uint8))
        (tmp_path / f"{number}.jpg").write_bytes(encode(picture, "JPEG"))
    rows = [{"image": f"{number}.jpg", "caption": f"{turn} of {number}"} for turn in range(2) for number in range(4)]
    lists = [{"image": f"{number}.jpg", "caption": [f"0 of {number}", f"1 of {number}"]} for number in range(4)]
    for name, table in (("rows", rows), ("lists", lists)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        write_shards(open_source(str(tmp_path / f"{name}.jsonl")), tmp_path / name, samples_per_shard=10, workers=1)
    assert (tmp_path / "rows" / "00000.tar").read_bytes() == (tmp_path / "lists" / "00000.tar").read_bytes()
