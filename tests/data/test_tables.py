"""Tables, Parquet files with images in them, and folders of the datasets library."""

import json
import pickle

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from refusals import refused
from torch.utils.data import DataLoader

from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.data.sources.tables import ParquetImages

# Tables


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_table_of_paths_and_captions(images, suffix):
    paths, captions = ["a.jpg", str(images / "b.jpg"), "gone.jpg"], ['one, "two"\nlines', " ", "Grüße"]
    path = images / f"pairs.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"filepath": paths, "title": captions, "width": [1, 2, 3]}), path)
    elif suffix == "jsonl":
        rows = zip(paths, captions, strict=True)
        path.write_text("".join(json.dumps({"title": c, "filepath": p}, ensure_ascii=False) + "\n" for p, c in rows))
    else:
        quoted = [f'"{caption.replace(chr(34), chr(34) * 2)}"' for caption in captions]
        lines = [["\ufefffilepath", "width", "title"], *zip(paths, "123", quoted, strict=True)]
        path.write_text("\n".join((", "[0] if suffix == "csv" else "\t").join(line) for line in lines))
    source = open_source(str(path))
    assert len(source) == 3 and source.class_names is None
    assert [source.captions(index) for index in range(3)] == [(caption,) for caption in captions]
    assert [source[0].image, source[1].image] == [b"a", b"b"] and source[0].key == f"pairs.{suffix}:0"
    with pytest.raises(BadSample, match="missing_image"):
        source[2]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_captions_in_lists(images):
    (images / "x.jsonl").write_text('{"image": "a.jpg", "captions": ["x", null, "y"]}\n{"image": "b.jpg"}\n')
    source = open_source(str(images / "x.jsonl"))
    assert source.captions(0) == ("x", "y") and source.captions(1) == ()


def test_explicit_columns(images):
    (images / "x.csv").write_text("photo,alt,text\na.jpg,from alt,from text\n")
    source = open_source(str(images / "x.csv"), image_column="photo", caption_column="alt")
    assert source[0].image == b"a" and source.captions(0) == ("from alt",)


def test_several_tables_keep_their_own_folders(images):
    for folder in ("p", "q"):
        (images / folder).mkdir()
        (images / folder / "a.jpg").write_bytes(folder.encode())
        (images / folder / "x.csv").write_text(f"image,text\na.jpg,{folder}\n../b.jpg,again\n")
    source = open_source(f"{images}/*/x.csv")
    assert [source[index].image for index in range(4)] == [b"p", b"b", b"q", b"b"]
    assert source.captions(2) == ("q",) and source[3].key == "q/x.csv:1"


def test_bad_text_costs_one_sample(images):
    (images / "x.csv").write_bytes(b"image,text\na.jpg,\xff\xfe\nb.jpg,good\n")
    (images / "x.jsonl").write_bytes(b'{"image": "a.jpg", "text": "\xff\xfe"}\n{"image": "b.jpg", "text": "good"}\n')
    for suffix in ("csv", "jsonl"):
        source = open_source(str(images / f"x.{suffix}"))
        assert source.captions(1) == ("good",)
        for read in (source.captions, source.__getitem__):
            with pytest.raises(BadSample, match="bad_utf8"):
                read(0)


def test_class_names_of_tables(images):
    (images / "x.csv").write_text("image,class\na.jpg,wren\nb.jpg,\nc.jpg,jay\n")
    source = open_source(str(images / "x.csv"), prompts="plain")
    assert source.class_names == ("jay", "wren")
    assert [source.label(index) for index in range(3)] == [1, None, 0]
    assert source.captions(0) == ("wren",) and source.captions(1) == () and source[2].captions == ("jay",)
    (images / "classes.json").write_text('["wren", "owl", "jay"]')
    assert open_source(str(images / "x.csv")).label(2) == 2
    (images / "x.csv").write_text("image,label\na.jpg,7\n")
    refused(images / "x.csv", "label 7, but there are 3 class names")
    (images / "x.csv").write_text("image,label\na.jpg,owls\n")
    refused(images / "x.csv", "label 'owls' is not among .* Did you mean 'owl'")
    (images / "classes.json").write_text('{"a": 1.5}')
    refused(images / "x.csv", "classes.json: class names must be a list")
    (images / "classes.json").write_text('["a", "a"]')
    refused(images / "x.csv", "class name 'a' is there twice")


def test_the_image_column_may_have_the_name_of_a_models_argument(images):
    (images / "x.csv").write_text("pixel_values,text\na.jpg,x\n")
    assert open_source(str(images / "x.csv")).reading.startswith("image: column 'pixel_values', caption: column 'text'")


def test_splits_that_lie_in_one_folder_are_not_taken_for_one(images):
    """As datasets lays them out on the hub: data/train-00000-of-00001.parquet, data/test-00000-of-00001.parquet."""
    for folder in ("hub/data", "parts/data"):
        (images / folder).mkdir(parents=True)
    for name in ("hub/data/train-00000-of-00001", "hub/data/test-00000-of-00001", "parts/data/0", "parts/data/1"):
        (images / f"{name}.csv").write_text("image,text\n../../a.jpg,x\n")
    refused(images / "hub", r"give '.*/hub/data/test\*.csv' or '.*/hub/data/train\*.csv'; there are")
    refused(images / "parts", r"give '.*/parts/data/\*.csv'; there are")
    assert open_source(f"{images}/hub/data/*.csv").reading.endswith("; test, train are taken together")
    for spec in ("hub/data/train*.csv", "parts/data/*.csv"):
        assert "together" not in open_source(f"{images}/{spec}").reading


def test_labels_without_names_can_be_opened_but_have_no_captions(images):
    (images / "x.csv").write_text("image,label\na.jpg,7\n")
    source = open_source(str(images / "x.csv"))
    assert source.label(0) == 7 and source.class_names is None and source.captions(0) == ()


def test_fingerprint_follows_the_content(images):
    def written(text):
        (images / "x.csv").write_text(text)
        return open_source(str(images / "x.csv")).fingerprint

    first = written("image,text\na.jpg,one\n")
    assert written("image,text\na.jpg,two\n") != first == written("image,text\na.jpg,one\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("image,text\n", "has no rows"),
        ("picture,text\na.jpg,x\n", "no image column among the columns picture, text; name it with image_column"),
        ("url,text\nhttp://x/a.jpg,x\n", "web addresses only: download"),
        ("image,text\nhttps://x/a.jpg,x\n", "column 'image' holds web addresses; download"),
        ("image,width\na.jpg,3\n", "neither captions nor labels"),
        ("image,text,text\na.jpg,x,y\n", "column 'text' is there twice"),
        ("image,text\na.jpg,x,y\n", "cannot be read as csv"),
    ],
)
def test_bad_table_is_refused(images, content, message):
    (images / "x.csv").write_text(content)
    refused(images / "x.csv", message)


def test_missing_column_is_named_with_those_there_are(images):
    (images / "x.csv").write_text("image,caption_en\na.jpg,x\n")
    refused(
        images / "x.csv", "no column 'caption_fr'; the columns are: image, caption_en. Did", caption_column="caption_fr"
    )
    refused(images / "x.csv", "no column 'img'; the columns are", image_column="img")


def test_other_damaged_tables_are_refused(images):
    (images / "x.parquet").write_bytes(b"PAR1 and then nothing")
    refused(images / "x.parquet", "cannot be read as parquet")
    (images / "x.jsonl").write_text('{"image": "a.jpg"\n')
    refused(images / "x.jsonl", "cannot be read as jsonl")
    pq.write_table(pa.table({"image": [1, 2], "text": ["x", "y"]}), images / "x.parquet")
    refused(images / "x.parquet", "column 'image' holds int64")
    pq.write_table(pa.table({"image": ["a.jpg"], "text": [1.5]}), images / "x.parquet")
    refused(images / "x.parquet", "column 'text' holds double")
    (images / "y0.csv").write_text("image,text\na.jpg,x\n")
    (images / "y1.csv").write_text("path,text\na.jpg,x\n")
    refused(images / "y*.csv", "y1.csv: its columns or class names differ from those of .*y0.csv")


# Parquet with embedded images


def test_cifar_parquet(shared_data):
    source = open_source(f"{shared_data}/cifar10/train-*.parquet")
    assert len(source) == 50000 and source.class_names[0] == "airplane" and len(source.class_names) == 10
    second = pq.read_table(shared_data / "cifar10" / "train-00001-of-00002.parquet")
    for row in (0, 24999):
        record = source[25000 + row]
        assert record.image == second["image"][row]["bytes"].as_py()
        assert record.label == second["label"][row].as_py() == source.label(25000 + row)
        assert record.key == f"train-00001-of-00002.parquet:{row}"
    name = source.class_names[source.label(5)]
    assert source.captions(5)[0] == f"a photo of a {name}." and len(source.captions(5)) == 18


def test_class_label_names_and_pickles_of_datasets_parquet(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"img": Value("binary"), "fine_label": ClassLabel(names=["jay", "wren"])})
    Dataset.from_dict({"img": [b"x", b"y"], "fine_label": [1, 0]}, features=features).to_parquet(tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"), prompts="plain")
    assert source.class_names == ("jay", "wren") and source[0].image == b"x" and source[0].captions == ("wren",)


def test_parquet_images_keep_few_row_groups(tmp_path):
    rows = [bytes([index]) * 1000 for index in range(40)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", row_group_size=7)
    images = ParquetImages([str(tmp_path / "x.parquet")] * 2, "image", cache_bytes=17_000)
    for row in (0, 79, 6, 7, 39, 40, 13, 35):
        assert images[row].as_py() == rows[row % 40]
        assert sum(group.nbytes for group in images._decoded.values()) <= 17_000
    assert len(images._decoded) == 2
    assert len(pickle.dumps(images)) < 2000


def test_parquet_in_workers(shared_data):
    source = open_source(f"{shared_data}/cifar10/test.parquet")
    order = list(range(0, 10000, 400))
    here = [source[index] for index in order]
    assert list(DataLoader(source, sampler=order, batch_size=None, num_workers=2)) == here


# The datasets library


@pytest.fixture(scope="module")
def dataset():
    from datasets import ClassLabel, Dataset, Features, Image, List, Value
    from PIL import Image as Pillow

    features = Features(
        {"image": Image(), "captions": List(Value("string")), "label": ClassLabel(names=["jay", "wren"])}
    )
    rows = {
        "image": [Pillow.new("RGB", (4, 4), (index, 0, 0)) for index in range(6)],
        "captions": [[f"bird {index}", "a bird"] for index in range(6)],
        "label": [index % 2 for index in range(6)],
    }
    return Dataset.from_dict(rows, features=features)


def test_saved_dataset(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "birds")
    source = open_source(str(tmp_path / "birds"))
    record = source[3]
    assert len(source) == 6 and record.image.startswith(b"\x89PNG") and record.label == 1
    assert record.captions == source.captions(3) == ("bird 3", "a bird")
    assert open_source(str(tmp_path / "birds"), prompts="plain").captions(3) == ("wren",)
    assert open_source(str(tmp_path / "birds")).fingerprint == source.fingerprint
    again = pickle.loads(pickle.dumps(source))
    assert again[5] == source[5]
    loader = DataLoader(source, sampler=range(6), batch_size=None, num_workers=2)
    assert list(loader) == [source[index] for index in range(6)]


def test_bad_text_of_a_saved_dataset_costs_one_sample(tmp_path):
    from datasets import Dataset

    unchecked = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    texts = pc.cast(pa.array([b"\xff\xfe", b"good"]), options=unchecked)
    Dataset(pa.table({"image": [b"x", b"y"], "text": texts})).save_to_disk(tmp_path / "bad")
    source = open_source(str(tmp_path / "bad"))
    assert source.captions(1) == ("good",)
    with pytest.raises(BadSample, match="bad_utf8"):
        source.captions(0)


def test_saved_splits(dataset, tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=dataset, test=dataset.select(range(2, 4))).save_to_disk(tmp_path / "birds")
    source = open_source(f"{tmp_path}/birds:test")
    assert len(source) == 2 and source.captions(0) == ("bird 2", "a bird")
    assert source.fingerprint != open_source(f"{tmp_path}/birds:train").fingerprint
    refused(f"{tmp_path}/birds", "has the splits train, test; choose one")
    refused(f"{tmp_path}/birds:tset", "no split 'tset'; .* Did you mean 'test'")


def test_saved_dataset_named_wrongly(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "birds")
    refused(f"{tmp_path}/birds:train", "has no splits")
    refused(f"{tmp_path}/birds", "no column 'alt'; the columns are: image, captions, label", caption_column="alt")
    dataset.select_columns(["image"]).save_to_disk(tmp_path / "bare")
    refused(tmp_path / "bare", "neither captions nor labels")
    state = tmp_path / "birds" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    refused(tmp_path / "birds", "has no rows")
    state.write_text("{")
    refused(tmp_path / "birds", "datasets cannot open it")


def test_hub_name_goes_through_load_dataset(dataset, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        if path == "nobody/nothing":
            raise ConnectionError("no route\nto host")
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert open_source("hf:me/birds:test")[2].label == 0 and open_source("hf:me/birds").captions(0)[0] == "bird 0"
    assert asked == [("me/birds", "test"), ("me/birds", "train")]
    assert open_source("hf:me/birds").reading.endswith("; split train ('hf:me/birds:SPLIT' names another)")
    assert "split" not in open_source("hf:me/birds:test").reading
    refused("hf:nobody/nothing", r"hf:nobody/nothing: datasets cannot open it \(no route\)")
    refused("hf:", "hf: needs a name")
