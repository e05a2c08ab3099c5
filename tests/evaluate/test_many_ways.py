"""One set of pairs, or of classes, written in every way that people write it: the same figures."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_writing import write_tar
from small_model import save_small_model, script_caller

import contrastive
from contrastive.data.sources import open_source
from contrastive.data.sources.scenes import Scenes
from contrastive.evaluate.retrieval import retrieval

# Pairs: (key, JPEG, captions) each


def as_txt_shards(folder, pairs):
    """The first caption in KEY.txt would be all there is: a caption a line, as clip_benchmark's exporter writes."""
    return in_shards(folder, pairs, "txt", lambda captions: "\n".join(captions) + "\n")


def as_json_shards(folder, pairs):
    return in_shards(folder, pairs, "json", lambda captions: json.dumps({"captions": captions}))


def in_shards(folder, pairs, suffix, content):
    half = len(pairs) // 2
    for number, part in enumerate((pairs[:half], pairs[half:])):
        members = []
        for key, image, captions in part:
            members += [(f"{key}.jpg", image), (f"{key}.{suffix}", content(list(captions)).encode())]
        write_tar(folder / f"{number}.tar", members)
    return str(folder / "{0..1}.tar")


def as_lines(folder, pairs):
    """An image folder with a caption a line beside each image."""
    put_images(folder, pairs)
    for key, _, captions in pairs:
        (folder / "images" / f"{key}.txt").write_text("\n".join(captions))
    return str(folder / "images")


def as_csv(folder, pairs, name="pairs.csv", delimiter=","):
    put_images(folder, pairs)
    with open(folder / name, "w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["image", "caption"])
        table.writerows([f"images/{key}.jpg", caption] for key, _, captions in pairs for caption in captions)
    return str(folder / name)


def as_tsv(folder, pairs):
    return as_csv(folder, pairs, "pairs.tsv", "\t")


def as_jsonl(folder, pairs):
    """A line for each caption, the first captions of all images first."""
    put_images(folder, pairs)
    most = max(len(captions) for _, _, captions in pairs)
    rows = [
        {"image": f"images/{key}.jpg", "caption": captions[number]}
        for number in range(most)
        for key, _, captions in pairs
        if number < len(captions)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def as_list_parquet(folder, pairs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": image, "path": None}, "captions": list(captions)} for _, image, captions in pairs]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def as_row_parquet(folder, pairs):
    """The image's bytes again and again, in a row for each caption."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": image}, "caption": caption} for _, image, captions in pairs for caption in captions]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def as_saved_dataset(folder, pairs):
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"image": Image(), "captions": List(Value("string"))})
    rows = {"image": [{"bytes": image} for _, image, _ in pairs], "captions": [list(said) for *_, said in pairs]}
    Dataset.from_dict(rows, features).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_image_folder(folder, pairs):
    """As `datasets` has it: metadata.csv beside the images, a row for each caption."""
    put_images(folder, pairs)
    with open(folder / "images" / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        table.writerows([f"{key}.jpg", caption] for key, _, captions in pairs for caption in captions)
    return str(folder / "images")


def put_images(folder, pairs):
    (folder / "images").mkdir()
    for key, image, _ in pairs:
        (folder / "images" / f"{key}.jpg").write_bytes(image)


WAYS = [
    as_txt_shards,
    as_json_shards,
    as_lines,
    as_csv,
    as_tsv,
    as_list_parquet,
    as_row_parquet,
    as_jsonl,
    as_saved_dataset,
    as_image_folder,
]


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="session")
def scenes():
    """Scenes with one caption to three."""
    source = Scenes("test")
    return [(f"{i:03d}", jpeg(source[i].image), source.captions(i)[: 1 + i % 3]) for i in range(0, 600, 10)]


def flickr8k(folder: Path, number: int):
    """The first photographs of the dev split, with five captions each."""
    pairs = []
    with tarfile.open(folder / "flickr8k" / "dev-000000.tar") as tar:
        members = {member.name: member for member in tar}
        for name in [name for name in members if name.endswith(".jpg")][:number]:
            key = name.removesuffix(".jpg")
            said = json.load(tar.extractfile(members[f"{key}.json"]))["captions"]
            pairs.append((key, tar.extractfile(members[name]).read(), said))
    return pairs


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "final")


def counts_and_recalls(spec, bundle):
    result = retrieval(bundle, open_source(spec), device="cpu", captions="all")
    recalls = {name: value for name, value in result.items() if re.search(r"_r\d+$", name)}
    return (result["num_images"], result["num_texts"], result["skipped"]), recalls


@pytest.mark.parametrize("write", WAYS)
def test_pairs_written_in_any_way_are_the_same_pairs(tmp_path, write, scenes, model):
    bundle = contrastive.load(model)
    (tmp_path / "plain").mkdir()
    expected = counts_and_recalls(as_json_shards(tmp_path / "plain", scenes), bundle)
    assert expected[0] == (60, 120, {}) and len(expected[1]) == 6
    (tmp_path / "way").mkdir()
    assert counts_and_recalls(write(tmp_path / "way", scenes), bundle) == expected


@pytest.mark.parametrize("write", WAYS)
def test_flickr8k_written_in_any_way_has_the_same_recalls(tmp_path, write, shared_data, model):
    pairs = flickr8k(shared_data, 60)
    bundle = contrastive.load(model)
    (tmp_path / "plain").mkdir()
    expected = counts_and_recalls(as_json_shards(tmp_path / "plain", pairs), bundle)
    assert expected[0] == (60, 300, {}) and len(expected[1]) == 6
    (tmp_path / "way").mkdir()
    assert counts_and_recalls(write(tmp_path / "way", pairs), bundle) == expected


@pytest.mark.parametrize("write", WAYS)
def test_shards_rewritten_from_any_way_are_the_same_pairs(tmp_path, write, scenes, monkeypatch, capfd):
    (tmp_path / "way").mkdir()
    source = open_source(write(tmp_path / "way", scenes))
    done = script_caller("shard.py", monkeypatch, capfd)(source.name, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 0, done.stderr
    again = open_source(str(tmp_path / "shards" / "*.tar"))
    assert [again.captions(i) for i in range(len(again))] == [source.captions(i) for i in range(len(source))]
    assert again.captions(5) == tuple(scenes[5][2]) and len(again) == len(scenes)


# Classes: Imagenette's ten, as (WordNet id, its own name), in the order of the ids

TEN = [
    ("n01440764", "tench"),
    ("n02102040", "English springer"),
    ("n02979186", "cassette player"),
    ("n03000684", "chainsaw"),
    ("n03028079", "church"),
    ("n03394916", "French horn"),
    ("n03417042", "garbage truck"),
    ("n03425413", "gas pump"),
    ("n03445777", "golf ball"),
    ("n03888257", "parachute"),
]


def class_folders(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def as_wnid_table(folder):
    class_folders(folder, [wnid for wnid, _ in TEN])
    rows = [f"{wnid}/{i}.png,{wnid}\n" for i in range(4) for wnid, _ in TEN]
    (folder / "table.csv").write_text("image,label\n" + "".join(rows))
    return folder / "table.csv"


def as_name_table(folder):
    class_folders(folder, [wnid for wnid, _ in TEN])
    rows = [f"{wnid}/{i}.png,{name}\n" for i in range(4) for wnid, name in TEN]
    (folder / "table.csv").write_text("image,label\n" + "".join(rows))
    return folder / "table.csv"


CLASS_WAYS = {
    "WordNet ids": (lambda folder: class_folders(folder, [wnid for wnid, _ in TEN]), ()),
    "WordNet ids with ImageNet's names": (
        lambda folder: class_folders(folder, [wnid for wnid, _ in TEN]),
        ("--classes", "imagenet"),
    ),
    "numbers": (lambda folder: class_folders(folder, map(str, range(10))), ("--classes", "imagenette")),
    "names": (lambda folder: class_folders(folder, [name for _, name in TEN]), ()),
    "names with underscores": (
        lambda folder: class_folders(folder, [name.replace(" ", "_").lower() for _, name in TEN]),
        ("--classes", "imagenette"),
    ),
    "a table of ids": (as_wnid_table, ()),
    "a table of names": (as_name_table, ("--classes", "imagenette")),
}


@pytest.mark.parametrize("way", CLASS_WAYS)
def test_classes_written_in_any_way_have_the_same_figures(tmp_path, way, model, monkeypatch, capfd):
    script = script_caller("zero_shot.py", monkeypatch, capfd)
    found = []
    for name in ("WordNet ids", way):
        write, flags = CLASS_WAYS[name]
        data, out = write(tmp_path / f"{len(found)}"), tmp_path / f"out{len(found)}"
        done = script(model, "--data", data, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((out / "zero_shot.json").read_text()))
    expected, result = found
    assert result["num_images"] == expected["num_images"] == 40
    for figure in ("acc1", "acc5", "mean_per_class_recall"):
        assert result[figure] == expected[figure], figure
    spoken = [name.casefold().replace(" ", "") for name in expected["class_names"]]
    assert "chainsaw" in spoken and "n01440764" not in spoken
