"""What changed files once did to a reader, each by the least input that did it, and what is refused on principle."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_writing import write_tar
from texts import LAUGHS

from contrastive.config import from_dict
from contrastive.data.class_joining import read_class_file
from contrastive.data.decode import MAX_COPIED_PIXELS, MAX_PILLOW_PIXELS, decode
from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.record import BadSample
from contrastive.data.shards.shard_index import load_index, read_index
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import load_tokenizer, train_bpe
from contrastive.errors import UserError, did_you_mean
from contrastive.files import problem, read_yaml
from contrastive.interop.bundle import build
from contrastive.interop.run_record import RunRecord
from contrastive.log import read_metrics
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig

NAMES_OUTSIDE = ("../x", "/etc/passwd", "n" * 300)
DEEP = "[" * 100_000 + "]" * 100_000


def test_a_message_is_one_line_whatever_names_are_in_it():
    error = UserError("no 'a\nb\x1b[2J\u2028\ud83d\u202e' " + "x" * 100_000)
    assert str(error).isprintable() and len(str(error)) < 5000
    assert str(error).startswith(r"no 'a\nb\x1b[2J\u2028\ud83d\u202e'")
    assert did_you_mean("x" * 10**6, ["x" * 10**6, "y"]) == ""


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "&a [*a]", "a: 2001-13-45", "? [a]\n: b", "[" * 3000, "!!python/object/apply:os.system ['touch x']"],
)
def test_yaml_that_is_a_trap(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="x.yaml"):
        read_yaml(tmp_path / "x.yaml", "the file")


@pytest.mark.parametrize(
    "sums",
    [DEEP, "[]", *(f'{{"sha256": {held}}}' for held in ("[1]", '"x"', *(f'{{"{n}": "0"}}' for n in NAMES_OUTSIDE)))],
)
def test_a_manifest_of_something_else(tmp_path, sums):
    (tmp_path / "manifest.json").write_text(sums)
    assert problem(tmp_path)


def test_metrics_that_are_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n3\n{"step": 2, "x": "\xff"}\n' + DEEP.encode())
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("kind", "pixels"), [("PNG", MAX_PILLOW_PIXELS), ("WEBP", MAX_COPIED_PIXELS)])
def test_a_picture_takes_less_than_300_megabytes(kind, pixels):
    def peak(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))

    side, file = int(pixels**0.5), io.BytesIO()
    Image.new("RGB", (side, side), (1, 2, 3)).save(file, kind)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak("VmRSS")
    assert decode(file.getvalue()).shape == (3, side, side)
    assert peak("VmHWM") - before < 300
    file = io.BytesIO()
    Image.new("1", (side + 2, side + 2)).save(file, kind)
    with pytest.raises(BadSample, match="too_large"):
        decode(file.getvalue())


def test_large_pictures_are_put_together_right():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1500, 1501, 3), np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, "PNG", exif=exif, compress_level=0)
    assert np.array_equal(decode(file.getvalue()).permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("table", [DEEP, "3", '[{"image": 18446744073709551616}]', '"x"'])
def test_json_that_is_no_table(tmp_path, table):
    (tmp_path / "x.json").write_text(table)
    with pytest.raises(UserError, match="x.json"):
        open_source(str(tmp_path / "x.json"))


def test_json_lines_at_which_arrow_ends_the_process(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n{"a": ' + DEEP + "}\n")
    with pytest.raises(UserError, match="x.jsonl: cannot be read"):
        open_source(str(tmp_path / "x.jsonl"))
    for line in ("null", "3", '"x"', "[1]", '{"a": 1} null', "{", '{"a": 1'):
        (tmp_path / "x.jsonl").write_text(f'{line}\n{{"image": "a.jpg", "caption": "x"}}\n')
        with pytest.raises(UserError, match="x.jsonl: cannot be read"):
            open_source(str(tmp_path / "x.jsonl"))
    lines = ['{"image": "a.jpg", "caption": "[[[ {} x"}'] * 1000  # brackets of texts, line by line, are no depth
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert len(open_source(str(tmp_path / "x.jsonl"))) == 1


def test_class_names_of_parquet_that_are_no_texts(tmp_path):
    features = {"label": {"names": [1, {}], "_type": "ClassLabel"}}
    table = pa.table({"image": [b"x", b"y"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    assert open_source(str(tmp_path / "x.parquet")).class_names is None


@pytest.mark.parametrize("names", [{}, {"id2label": []}, {"id2label": {}}, {"9" * 5000: "a"}, 3, DEEP])
def test_json_that_is_no_class_names(tmp_path, names):
    (tmp_path / "x.json").write_text(names if isinstance(names, str) else json.dumps(names))
    try:
        assert read_class_file(tmp_path / "x.json").names == ("a",)
    except UserError as error:
        assert "x.json" in str(error)


# Indexes of shards


@pytest.fixture
def shard(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    path = write_tar(tmp_path / "s.tar", [("a.png", data.getvalue()), ("a.txt", b"a cat")])
    open_source(path)
    load_index.cache_clear()
    return tmp_path


def edited(shard, **changes):
    path = shard / ".contrastive-index" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= {name: value for name, value in changes.items() if name != "shards_in"}
    manifest |= {name: value for name, value in changes.items() if name == "shards_in"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read as an index"):
        read_index(str(shard / ".contrastive-index"))


@pytest.mark.parametrize(
    "change",
    [{"samples": [1]}, {"samples": 10**9}, {"size": -1}, {"fields": [[1]]}, 
     {"refused": {"x": {"count": "a", "keys": []}}},
     {"name": "../../etc/passwd"}, {"name": ".."}, {"name": "\ud800"}, {"shards_in": "/etc"}, {"shards_in": "file:///etc"}],
)  # fmt: skip
def test_a_manifest_that_is_none_of_ours(shard, change):
    edited(shard, **change)


@pytest.mark.parametrize(
    ("name", "value"),
    [("spans", np.full((1, 4, 2), 2**30, np.int32)), ("spans", np.full((1, 4, 2), -1, np.int32)),
     ("refusals", np.full(1, 9, np.uint8)),
     ("key_ends", np.array([99], np.int64)),
     ("key_blob", np.zeros(0, np.uint8)), ("spans", np.zeros((2**26,), np.int32))],
)  # fmt: skip
def test_an_index_that_is_none_of_ours(shard, name, value):
    path = shard / ".contrastive-index" / "s.tar.npz"
    with np.load(path) as stored:
        arrays = {**stored, name: value}
    np.savez_compressed(path, **arrays)
    if name == "spans" and value.max() == -1:
        arrays["spans"][0, 0] = (-5, 3)
        np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match="is damaged"):
        open_source(str(shard / ".contrastive-index"))[0]


# Tokenizers and models


def test_half_a_character_is_no_text():
    with pytest.raises(UserError, match="half a character"):
        train_bpe(["a cat"], 300, 8)("a \ud83d")


@pytest.mark.parametrize("change", [{"kind": None}, {"context_length": "x"}, {"clean": 3}, {"eos_id": None}])
def test_tokenizer_options_of_other_types(tmp_path, change):
    train_bpe(["a cat"], 300, 8).save(tmp_path)
    path = tmp_path / "contrastive_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({"kind": "bpe", "context_length": 8}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("cls", "values"),
    [(ImageTowerConfig, {"width": "x"}), (ImageTowerConfig, 3), (PreprocessConfig, {"mean": [0, 0, None]}),
     (PreprocessConfig, {"image_size": 10**6})],
)  # fmt: skip
def test_options_in_a_model_folder_of_other_types(cls, values):
    with pytest.raises(UserError):
        from_dict(cls, values, "config.json")


def test_a_config_does_not_ask_for_more_than_the_weights(tmp_path):
    for options in ({"depth": 10**9}, {"num_heads": 0}, {"width": 2**40, "num_heads": 1}):
        with pytest.raises(UserError):
            ImageTowerConfig(**options).check()
    large = ImageModelConfig(768, ImageTowerConfig())
    with pytest.raises(UserError, match="has 4 weights, its config asks for"):
        build(lambda: ImageModel(large), {"x": torch.zeros(4)}, tmp_path)


def test_a_tokenizer_that_asks_for_a_billion_ids(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 2000000000}')
    with pytest.raises(UserError, match="extra_ids is 2000000000"):
        load_tokenizer(tmp_path, 12)


def test_a_run_that_was_mended_by_hand(tmp_path):
    from interop.small_bundles import small_bundle

    from contrastive.files import write_folder
    from contrastive.interop.bundle import save_model

    bundle = small_bundle("classifier")
    parts = bundle.model.state_dict(), bundle.config, bundle.preprocess.config
    write_folder(tmp_path / "final", lambda to: save_model(to, *parts, class_names=bundle.class_names))
    for text in ("data: {augment: {crop_scale: [1]}}", "train: {steps: x, global_batch_size: []}", "&a {loss: *a}"):
        (tmp_path / "config.yaml").write_text(text)
        try:
            RunRecord.of(tmp_path / "final")
        except UserError:
            continue
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "config.yaml").write_text("data: {augment: {crop_scale: [1]}}")
    with pytest.raises(UserError, match="not as a run leaves it"):
        RunRecord.of(tmp_path / "final")
