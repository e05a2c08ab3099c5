"""What changed checkpoints and embedding stores once did to their readers, and pickles in their place."""

import json
import os
import struct
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bombs import object_array, torch_archive
from corpus import made, write_checkpoint, write_store
from reading import read_checkpoint, read_store
from sandbox import put
from texts import PICKLE

import contrastive
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.files import write_manifest

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def checkpoints():
    return {sharded: made(partial(write_checkpoint, sharded=sharded)) for sharded in (False, True)}


@pytest.mark.parametrize("pickle", [PICKLE, torch_archive()])
@pytest.mark.parametrize(
    ("sharded", "name"),
    [(False, "model.safetensors"), (False, "optimizer.safetensors"), (False, "ema.safetensors"), (True, "optimizer")],
)
def test_row_12_a_pickle_in_the_place_of_tensors_is_refused(tmp_path, monkeypatch, checkpoints, sharded, name, pickle):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "checkpoints", checkpoints[sharded])
    step = tmp_path / "checkpoints" / "step-00000004"
    place = next((step / name).glob("*.safetensors")) if sharded else step / name
    place.write_bytes(pickle)
    write_manifest(step)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "checkpoints")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_row_12_metadata_of_dcp_is_not_unpickled(tmp_path, monkeypatch, checkpoints, sharded):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "checkpoints", checkpoints[sharded])
    step = tmp_path / "checkpoints" / "step-00000004"
    for folder in {step, step / "optimizer"} if sharded else {step}:
        for name in (".metadata", "optimizer.pt", "__0_0.distcp"):
            (folder / name).write_bytes(PICKLE)
    write_manifest(step)
    read_checkpoint(tmp_path / "checkpoints")  # by the headers of the shards alone
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("state", ["3", "{}", DEEP, '{"step": "x"}', "\xff"])
def test_a_cursor_that_is_none(tmp_path, checkpoints, state):
    put(tmp_path, checkpoints[False])
    (tmp_path / "step-00000004" / "state.json").write_text(state, "latin-1")
    write_manifest(tmp_path / "step-00000004")
    with pytest.raises(UserError, match="state.json"):
        read_checkpoint(tmp_path)


def test_optimizer_state_of_another_optimizer(tmp_path, checkpoints):
    from safetensors.torch import load_file, save_file

    put(tmp_path, checkpoints[False])
    path = tmp_path / "step-00000004" / "optimizer.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith("/step")}, path)
    write_manifest(tmp_path / "step-00000004")
    with pytest.raises(UserError, match="of another optimizer"):
        read_checkpoint(tmp_path)


def test_an_average_of_another_model(tmp_path, checkpoints):
    from safetensors.torch import save_file

    put(tmp_path, checkpoints[False])
    save_file({"x": torch.zeros(1)}, tmp_path / "step-00000004" / "ema.safetensors")
    write_manifest(tmp_path / "step-00000004")
    with pytest.raises(UserError, match="averaged weights are of another model"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"data": 3},
        {"texts": False},
        {"data": {"num_samples": 0.5}},
        {"options": {"samples_per_shard": [1]}},
        {"options": {}},
        {"images": {"left_out": []}},
        {"key": None},
    ],
)
def test_a_store_of_other_types(tmp_path, change):
    put(tmp_path, made(write_store("npy")))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        read_store(tmp_path)


def test_embeddings_without_an_index(tmp_path):
    put(tmp_path, made(write_store("parquet")))
    path = tmp_path / "images-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "index", pa.nulls(4, pa.int64())), path)
    with pytest.raises(UserError, match="is damaged"):
        read_store(tmp_path)


@pytest.mark.parametrize("data", [PICKLE, object_array(), b"\x93NUMPY\1\0" + struct.pack("<H", 3) + b"{[\n"])
def test_embeddings_that_are_a_pickle(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "store", made(write_store("npy")))
    (tmp_path / "store" / "images-00000.npy").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_store(tmp_path / "store")
    assert not (tmp_path / "canary").exists()


def test_weights_in_a_pickle_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "open_clip_pytorch_model.bin"):
        (tmp_path / name).write_bytes(torch_archive())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "auto_map": {"AutoModel": "x.Model"}}))
    (tmp_path / "x.py").write_text("open('canary', 'w')")
    with pytest.raises(UserError):
        contrastive.load(tmp_path)
    assert not os.path.exists("canary")


def test_values_outside_of_an_arrow_file(tmp_path):
    import datasets

    rows = {"image": ["a.png", "b.png"], "text": ["a cat", "a dog"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    assert len(open_source(str(tmp_path))) == 2
    file = next(tmp_path.glob("*.arrow"))
    whole, offsets = file.read_bytes(), struct.pack("<3i", 0, 5, 10)
    assert whole.count(offsets) == 2  # of the paths and of the texts
    for place in (whole.index(offsets), whole.rindex(offsets)):
        file.write_bytes(whole[:place] + struct.pack("<3i", 0, 2**30, 10) + whole[place + 12 :])
        with pytest.raises(UserError, match="is damaged"):
            open_source(str(tmp_path))[0]
