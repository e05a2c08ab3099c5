"""Folders of images with captions, as people and other programs leave them: read, or refused with what is there."""

import json

import pytest
from pictures import encode
from PIL import Image
from refusals import refused
from set_writing import put

from contrastive.data.record import BadSample, fingerprint_of
from contrastive.data.shards.shard_writing import write_shards
from contrastive.data.sources import open_source

JPEG = encode(Image.new("RGB", (8, 8)), "JPEG")


def fill(root, images, **others):
    for path in images.split():
        put(root / path, JPEG)
    for path, content in others.items():
        put(root / path, content if isinstance(content, str) else json.dumps(content))
    return str(root)


def captions(source):
    return [source.captions(index) for index in range(len(source))]


def counts(source):
    return {reason: (found["count"], found["keys"][0]) for reason, found in source.left_aside.items()}


# Texts beside the images


def test_a_text_is_a_caption_a_line(tmp_path):
    texts = {"a.txt": "\ufeffone\r\n\r\ntwo\r\n", "b.txt": "three"}
    source = open_source(fill(tmp_path / "in", "a.jpg b.jpg", **texts))
    assert captions(source) == [("one", "two"), ("three",)] and source[0].captions == ("one", "two")
    assert source.reading == "captions: KEY.txt, one a line"
    write_shards(source, tmp_path / "out", workers=1)
    assert captions(open_source(f"{tmp_path}/out/*.tar")) == captions(source)


@pytest.mark.parametrize("texts", [True, False])
def test_files_of_img2dataset(tmp_path, texts):
    others = {"00000_stats.json": "{}", "00000.parquet": "PAR1", "00001.parquet": "PAR1"}
    for key in ("00000/000000000", "00001/000010000"):
        others[f"{key}.json"] = {"caption": f"a {key}", "url": "u", "key": key, "status": "success"}
        others |= {f"{key}.txt": f"a {key}"} if texts else {}
    source = open_source(fill(tmp_path, "00000/000000000.jpg 00001/000010000.jpg", **others))
    assert captions(source) == [("a 00000/000000000",), ("a 00001/000010000",)]
    assert source.class_names is None
    assert source.reading == ("captions: KEY.txt" if texts else "captions: KEY.json 'caption'")
    assert counts(source) == {".parquet": (2, "00000.parquet"), ".json without image": (1, "00000_stats.json")}


def test_a_fingerprint_is_as_it_was_where_each_text_has_one_line(tmp_path):
    lines = open_source(fill(tmp_path / "lines", "a.jpg", **{"a.txt": "one\ntwo"}))
    for name, json_too in (("line", {}), ("both", {"a.json": {"caption": "one"}})):
        source = open_source(fill(tmp_path / name, "a.jpg", **{"a.txt": "one", "._a.txt": "x"}, **json_too))
        assert source.fingerprint == fingerprint_of("a.jpg\0a.txt") != lines.fingerprint


def test_images_without_a_text_are_told_and_stay_samples(tmp_path):
    source = open_source(fill(tmp_path, "a.jpg b.jpg c.jpg", **{"a.txt": "one", "b.json": {"caption": "two"}}))
    assert captions(source) == [("one",), ("two",), ()]
    assert source.reading == "captions: KEY.txt, else KEY.json 'caption'; 1 images have none"


def test_a_json_that_cannot_be_read_costs_its_sample(tmp_path):
    others = {"a.json": "{broken", "b.json": {"captions": ["x", "y"], "weights": [1, 3]}}
    source = open_source(fill(tmp_path, "a.jpg b.jpg", **others))
    with pytest.raises(BadSample, match="bad_json"):
        source[0]
    assert source[1].captions == ("x", "y") and source[1].caption_weights == (1.0, 3.0)


def test_suffixes_in_capitals(tmp_path):
    assert captions(open_source(fill(tmp_path, "A.JPG", **{"A.TXT": "one"}))) == [("one",)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ("one", "two")),
        ("json", ("alt",)),
        ("dense", ("long",)),
        ("caption", ("alt",)),
        ("txt=1,dense=2", ("one", "two", "long")),
        ("alt.txt", ("third",)),
        (".cap", ("fourth",)),
    ],
)
def test_any_text_can_be_named(tmp_path, asked, expected):
    others = {
        "a.txt": "one\ntwo",
        "a.json": {"caption": "alt", "dense": "long"},
        "a.alt.txt": "third",
        "a.cap": "fourth",
    }
    source = open_source(fill(tmp_path, "a.jpg", **others), caption_column=asked)
    assert captions(source) == [expected]
    assert ("KEY.json says other in 1" in source.reading) == (asked is None)
    assert ".cap" not in source.left_aside if asked == ".cap" else counts(source)[".cap"] == (1, "a.cap")


def test_a_name_that_is_nowhere_is_refused(tmp_path):
    refused(
        fill(tmp_path, "a.jpg", **{"a.txt": "one", "a.json": {"caption": "alt"}}),
        "no caption field 'dense' in the JSON of the samples; the fields there are: caption; .*: .json, .txt",
        caption_column="dense",
    )


def test_files_left_aside_are_counted(tmp_path):
    others = {name: "x" for name in ("b.heic", "c.AVIF", "d.mp4", "Thumbs.db", "._a.jpg", "notes.txt", "LICENSE")}
    source = open_source(fill(tmp_path, "a.jpg", **{"a.txt": "one"}, **others))
    assert len(source) == 1 and counts(source) == {
        "without suffix": (1, "LICENSE"),
        ".db": (1, "Thumbs.db"),
        ".heic": (1, "b.heic"),
        ".avif": (1, "c.AVIF"),
        ".mp4": (1, "d.mp4"),
        "hidden": (1, "._a.jpg"),
        ".txt without image": (1, "notes.txt"),
    }


def test_splits_with_captions_are_told_to_be_taken_together(tmp_path):
    source = open_source(fill(tmp_path, "train/1.jpg val/1.jpg", **{"train/1.txt": "x", "val/1.txt": "y"}))
    assert source.reading == "captions: KEY.txt; train, val are taken together"


# A table of file names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\nx/1.jpg,a dog\ny/1.jpg,a cat\n"),
        ("metadata.jsonl", '{"file_name": "x/1.jpg", "text": "a dog"}\n{"file_name": "y/1.jpg", "text": "a cat"}\n'),
    ],
)
def test_metadata_of_datasets(tmp_path, name, content):
    source = open_source(fill(tmp_path, "x/1.jpg y/1.jpg", **{name: content}))
    assert captions(source) == [("a dog",), ("a cat",)] and source[1].image == JPEG
    assert source.class_names is None and source.reading.startswith(f"{name}: ")


def test_metadata_in_parquet_with_a_column_asked_for(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = fill(tmp_path, "x/1.jpg y/1.jpg")
    pq.write_table(pa.table({"file_name": ["y/1.jpg"], "text": ["t"], "alt": ["a"]}), tmp_path / "metadata.parquet")
    source = open_source(root, caption_column="alt")
    assert captions(source) == [("a",)] and counts(source) == {"images in no row": (1, "x/1.jpg")}


def test_other_metadata_is_no_table_of_images(tmp_path):
    source = open_source(fill(tmp_path, "x/1.jpg y/1.jpg", **{"metadata.csv": "class,count\nx,1\n"}))
    assert source.class_names == ("x", "y") and counts(source) == {".csv": (1, "metadata.csv")}


def test_a_list_of_records_at_the_top_is_read(tmp_path):
    rows = [{"image": "i/1.jpg", "caption": "a dog"}, {"image": "i/2.jpg", "caption": "a cat"}]
    assert captions(open_source(fill(tmp_path, "i/1.jpg i/2.jpg", **{"captions.json": rows}))) == [
        ("a dog",),
        ("a cat",),
    ]


@pytest.mark.parametrize("images", ["i/1.jpg i/2.jpg", "i/1.jpg j/2.jpg", "i/1.jpg 2.jpg"])
def test_a_table_of_captions_beside_the_folders_is_read(tmp_path, images):
    first = images.split()[0]
    source = open_source(fill(tmp_path, images, **{"captions.csv": f"image,caption\n{first},a dog\n{first},a cat\n"}))
    assert captions(source) == [("a dog", "a cat")] and source.reading.startswith("captions.csv: ")
    assert counts(source) == {"images in no row": (1, images.split()[1])}


def test_several_tables_are_refused_with_what_to_give(tmp_path):
    table = "file_name,text\n1.jpg,t\n"
    fill(tmp_path, "a/1.jpg b/1.jpg", **{"a/metadata.csv": table, "b/metadata.csv": table})
    refused(tmp_path, r"the captions lie in a/metadata.csv, b/metadata.csv; give one, .* '.*/\*/metadata.csv'")
    assert len(open_source(f"{tmp_path}/*/metadata.csv")) == 2


# Not understood


@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        ("Images/1.jpg", {"captions.txt": "image,caption\n1.jpg,x\n"}, "there is '.*/Images/1.jpg'"),
        ("i/1.jpg", {"results.csv": "image,caption\n1.jpg,a dog\n"}, "has '1.jpg' .*relative paths start"),
        (
            "i/1.jpg i/2.jpg",
            {"val.csv": "filepath\ttitle\ni/1.jpg\ta dog\n", "test.tsv": "path\tcaption\ni/2.jpg\ta cat\n"},
            "captions lie in test.tsv, val.csv; give one, as '.*/test.tsv'",
        ),
        ("train2014/1.jpg val2014/1.jpg", {"annotations/captions_train2014.json": "{}"}, "captions_train2014.json'"),
        ("train2014/1.jpg val2014/1.jpg", {}, "its folders are splits"),
        ("a/1.jpg b/2.jpg", {"dataset_flickr8k.json": "{}"}, "dataset_flickr8k.json has no rows"),
        ("00000/1.jpg 00001/1.jpg", {"00000_stats.json": "{}"}, "folders of img2dataset .*; there are 2 .jpg, 1 .json"),
        ("00000/000000001.jpg 00001/000010001.jpg", {}, "folders of img2dataset .*; there are 2 .jpg$"),
        ("", {"test/0.tar": "x", "dataset_type.txt": "retrieval"}, r"but .tar files; give '.*/test/\*.tar'"),
        ("00000/1.jpg 00001/1.jpg", {"00000/1.json": {"caption": None, "url": "u"}}, "folders of img2dataset"),
        ("art/bed/1.jpg art/fork/1.jpg clip/bed/1.jpg clip/fork/1.jpg", {}, "give one, as '.*/art'"),
        ("1.jpg a/2.jpg", {}, "1 of 2 lie in no sub-folder, as '1.jpg'; there are 2 .jpg; read are: KEY.txt or"),
        ("1.jpg", {"1.caption": "x"}, "there are 1 .jpg, 1 .caption; .*others named by caption_column"),
        ("", {"a.npy": "x", "b.npy": "x", "c.heic": "x"}, "no images .*; there are 2 .npy, 1 .heic; read are"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_there(tmp_path, images, others, message):
    refused(fill(tmp_path, images, **others), message)


@pytest.mark.parametrize(
    ("images", "others"),
    [
        ("cat/images/1.jpg dog/images/1.jpg", {}),
        ("cat/1/a.jpg cat/2/a.jpg dog/1/a.jpg dog/2/a.jpg", {}),
        ("cat/train/a.jpg cat/test/a.jpg dog/train/a.jpg dog/test/a.jpg", {}),
        ("cat/v1/a.jpg cat/v2/a.jpg dog/v3/a.jpg", {}),
        ("cat/a.jpg dog/a.jpg", {"cat/a.json": {"shapes": []}, "labels.csv": "image,label\n", "README.txt": "x"}),
    ],
)
def test_class_folders_stay_class_folders(tmp_path, images, others):
    source = open_source(fill(tmp_path, images, **others))
    assert source.class_names == ("cat", "dog") and source.prompted
