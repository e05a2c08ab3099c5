"""Embeddings on disk: complete, the model's own, and whole whatever happens while they are written."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colour_model import COLOURS, ColourSource
from small_model import save_small_model

import contrastive
from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import EmbeddingStore, StoreOptions, claim_store, store_config
from contrastive.evaluate.embedding_writing import fill_store, model_identity, model_key
from contrastive.evaluate.embeddings import embed_images, embed_texts
from contrastive.evaluate.evaluated_model import load_embeddings

NAMES = list(COLOURS)
BOTH = ("images", "texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("store") / "final")


@pytest.fixture
def bundle(folder):
    return contrastive.load(folder)


def source_of(number=11, **options):
    source = ColourSource([NAMES[i % len(NAMES)] for i in range(number)], **options)
    source.fingerprint = f"{number} {options}"
    return source


def claim(out, bundle, source, **options):
    options = StoreOptions(**{"samples_per_shard": 4, **options})
    return claim_store(Path(out), store_config(model_identity(bundle), source, options))


def fill(out, bundle, source, parts=("images",), batch_size=3, **options):
    store = claim(out, bundle, source, **options)
    fill_store(store, bundle, source, parts, device="cpu", batch_size=batch_size)
    return store


@pytest.mark.parametrize("files", ["parquet", "npy"])
@pytest.mark.parametrize(("batch_size", "shard"), [(1, 4), (3, 4), (4, 4), (100, 4), (3, 100), (2, 1)])
def test_what_is_written_is_what_is_embedded(tmp_path, bundle, files, batch_size, shard):
    labels = [NAMES[i % 6] if i % 5 else None for i in range(11)]
    source = source_of(labels=labels, unreadable=(0, 3, 4, 10))
    store = fill(tmp_path, bundle, source, batch_size=batch_size, files=files, samples_per_shard=shard)
    found = load_embeddings(tmp_path, model_identity(bundle), source)
    expected = embed_images(bundle.model, source, bundle.preprocess, device="cpu")
    torch.testing.assert_close(found.features, expected.features)
    assert found.index.tolist() == expected.index.tolist() == [1, 2, 5, 6, 7, 8, 9]
    assert found.keys == tuple("1256789")
    assert found.labels.tolist() == [1, 2, -1, 0, 1, 2, 3]
    assert found.class_names == tuple(NAMES) and found.space == "projected"
    assert found.skipped == Counter(unreadable_image=4)
    assert store.config["images"]["left_out"] == {"unreadable_image": [f"picture {i}" for i in (0, 3, 4, 10)]}
    assert len(list(tmp_path.glob("*.npy"))) == (store.num_shards if files == "npy" else 0)


def test_captions_with_their_images(tmp_path, bundle):
    texts = {0: ("a red thing", "red"), 1: (" ", "green"), 2: (), 3: ("yellow",), 4: ("cyan",)}
    source = source_of(5, texts=texts, unreadable=(3,))
    fill(tmp_path, bundle, source, BOTH, samples_per_shard=2)
    found = load_embeddings(tmp_path, model_identity(bundle), source, parts=BOTH).texts
    assert found.texts == ("a red thing", "red", "green", "cyan")
    assert found.row.tolist() == [0, 0, 1, 3]  # of the images that could be read: 0, 1, 2 and 4
    assert found.caption.tolist() == [0, 1, 1, 0]
    expected = embed_texts(bundle.model, bundle.tokenizer, found.texts, device="cpu")
    torch.testing.assert_close(found.features, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["texts"]["left_out"] == {"empty_caption": ["sample 1"], "missing_caption": ["sample 2"]}


def test_texts_come_later_without_embedding_the_images_again(tmp_path, bundle, embedded):
    fill(tmp_path, bundle, source_of())
    assert sum(embedded) == 11
    with pytest.raises(UserError, match="has no texts"):
        load_embeddings(tmp_path, model_identity(bundle), parts=BOTH)
    fill(tmp_path, bundle, source_of(), BOTH)
    assert sum(embedded) == 11 and len(load_embeddings(tmp_path, parts=BOTH).texts.texts) == 11


def test_features_before_the_projection(tmp_path, bundle):
    fill(tmp_path, bundle, source_of(), space="pooled")
    found = load_embeddings(tmp_path)
    assert found.features.shape == (11, 48) and found.space == "pooled"
    with torch.no_grad():
        pixels = torch.stack([bundle.preprocess(source_of()[i].image) for i in range(11)])
        expected = bundle.model.encode_image(pixels, normalize=False, project=False)
        torch.testing.assert_close(found.features, expected)
        projected = torch.nn.functional.normalize(bundle.model.image_tower.projection(found.features), dim=-1)
        torch.testing.assert_close(projected, bundle.model.encode_image(pixels))


def test_half_precision_in_standard_parquet(tmp_path, bundle):
    fill(tmp_path / "half", bundle, source_of(), dtype="float16")
    fill(tmp_path / "whole", bundle, source_of())
    table = pq.read_table(tmp_path / "half" / "images-00001.parquet")
    assert table.column_names == ["index", "key", "label", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[32]"
    half, whole = load_embeddings(tmp_path / "half"), load_embeddings(tmp_path / "whole")
    assert half.features.dtype == torch.float32
    torch.testing.assert_close(half.features, whole.features, atol=1e-3, rtol=0)
    assert not torch.equal(half.features, whole.features)


def test_what_does_not_fit_half_precision_is_refused(tmp_path, bundle):
    with torch.no_grad():
        bundle.model.image_tower.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match="do not fit into float16; use float32"):
        fill(tmp_path, bundle, source_of(), space="pooled", dtype="float16")
    assert not list(tmp_path.glob("*.parquet"))


def test_a_limit_is_the_same_subset_everywhere(tmp_path, bundle):
    fill(tmp_path, bundle, source_of(50), limit=9)
    found = load_embeddings(tmp_path)
    expected = contrastive.evaluate.embeddings.pick_indices(50, 9)
    assert found.index.tolist() == expected.tolist()


# Whose embeddings they are


def changed_weight(bundle, tmp_path):
    with torch.no_grad():
        bundle.model.image_tower.projection.weight[3, 5] += 1e-6
    return bundle


def other_heads(bundle, tmp_path):  # the weights are the same tensors, what they compute is not
    other = contrastive.load(save_small_model(tmp_path / "heads", num_heads=4))
    other.model.load_state_dict(bundle.model.state_dict())
    return other


def other_tokenizer(bundle, tmp_path):
    words = [("quick", "brown"), ("lazy", "dogs")] * 20
    return replace(bundle, tokenizer=contrastive.load(save_small_model(tmp_path / "words", words=words)).tokenizer)


@pytest.mark.parametrize("change", [changed_weight, other_heads, other_tokenizer])
def test_another_model_has_another_key_and_is_refused(tmp_path, bundle, folder, change):
    store = fill(tmp_path / "out", bundle, source_of())
    other = change(bundle, tmp_path)
    assert model_key(other) != model_key(contrastive.load(folder))
    assert store_config(model_identity(other), source_of(), StoreOptions())["key"] != store.key
    for attempt in (
        lambda: load_embeddings(tmp_path / "out", model_identity(other)),
        lambda: claim(tmp_path / "out", other, source_of()),
    ):
        with pytest.raises(UserError, match="holds embeddings of another model .*final") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_model_is_itself_in_any_folder(tmp_path, folder):
    os.symlink(folder, tmp_path / "elsewhere")
    assert model_key(contrastive.load(folder)) == model_key(contrastive.load(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 12}, "holds embeddings of other data"),
        ({"space": "pooled"}, "begun with space projected, not pooled"),
        ({"files": "npy"}, "begun with files parquet, not npy"),
        ({"limit": 3}, "begun with limit None, not 3"),
        ({"samples_per_shard": 5}, "begun with samples_per_shard 4, not 5"),
    ],
)
def test_other_data_and_other_options_are_refused(tmp_path, bundle, change, message):
    fill(tmp_path, bundle, source_of())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    source = source_of(change.pop("number", 11))
    with pytest.raises(UserError, match=message):
        fill(tmp_path, bundle, source, **change)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_other_preprocessing_is_refused(tmp_path, bundle):
    fill(tmp_path, bundle, source_of())
    config = replace(bundle.preprocess.config, resize="crop")
    other = replace(bundle, preprocess=contrastive.data.preprocess.Preprocess(config))
    with pytest.raises(UserError, match="other preprocessing"):
        load_embeddings(tmp_path, model_identity(other))


# Interruptions and damage


def test_goes_on_after_a_kill_with_the_shards_that_are_there(tmp_path, bundle, embedded, monkeypatch):
    written = []
    whole = EmbeddingStore.write

    def killed(store, part, shard, *args):
        path = store.path(part, shard)
        if len(written) == 2:
            (path.parent / f".{path.name}.1.partial").write_bytes(b"half a shard")
            os.utime(path.parent / f".{path.name}.1.partial", (0, 0))
            raise KeyboardInterrupt
        whole(store, part, shard, *args)
        written.append(path.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EmbeddingStore, "write", killed)
        fill(tmp_path, bundle, source_of(20))
    assert written == ["images-00000.parquet", "images-00001.parquet"]
    with pytest.raises(UserError, match="images are unfinished; run contrastive embed"):
        load_embeddings(tmp_path)
    embedded.clear()
    fill(tmp_path, bundle, source_of(20))
    assert sum(embedded) == 12  # of 20, 8 were there
    found = load_embeddings(tmp_path, model_identity(bundle), source_of(20))
    expected = embed_images(bundle.model, source_of(20), bundle.preprocess, device="cpu")
    torch.testing.assert_close(found.features, expected.features)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("files", ["parquet", "npy"])
def test_a_shard_is_whole_or_absent(tmp_path, bundle, monkeypatch, files):
    def torn(*args, **options):
        file = next(argument for argument in args if hasattr(argument, "write"))
        file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(pq if files == "parquet" else np, "write_table" if files == "parquet" else "save", torn)
        fill(tmp_path, bundle, source_of(), files=files)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    fill(tmp_path, bundle, source_of(), files=files)
    assert len(load_embeddings(tmp_path).features) == 11


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    values = pq.read_table(path).column("embedding").combine_chunks().flatten().to_numpy()
    data[data.index(values.tobytes()) + 99] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty, Path.unlink])
def test_a_damaged_shard_is_one_line(tmp_path, bundle, harm):
    fill(tmp_path, bundle, source_of())
    harm(tmp_path / "images-00001.parquet")
    with pytest.raises(UserError, match="images-00001.parquet is damaged .*delete it and embed again") as caught:
        load_embeddings(tmp_path, model_identity(bundle))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("files", "name"), [("parquet", "parquet"), ("npy", "parquet"), ("npy", "npy")])
def test_a_damaged_shard_that_was_deleted_is_made_again(tmp_path, bundle, embedded, files, name):
    fill(tmp_path, bundle, source_of(), files=files)
    expected = load_embeddings(tmp_path).features
    cut(tmp_path / "images-00001.parquet")
    with pytest.raises(UserError, match="images-00001.parquet is damaged .*delete it and embed again"):
        fill(tmp_path, bundle, source_of(), files=files)
    (tmp_path / "images-00001.parquet").unlink()
    embedded.clear()
    fill(tmp_path, bundle, source_of(), files=files)
    assert sum(embedded) == 4
    (tmp_path / f"images-00001.{name}").unlink()
    fill(tmp_path, bundle, source_of(), files=files)
    assert sum(embedded) == 8
    torch.testing.assert_close(load_embeddings(tmp_path).features, expected)


def test_a_shard_of_another_store_is_refused(tmp_path, bundle):
    fill(tmp_path / "a", bundle, source_of(11))
    fill(tmp_path / "b", bundle, source_of(12))
    (tmp_path / "b" / "images-00001.parquet").rename(tmp_path / "a" / "images-00001.parquet")
    with pytest.raises(UserError, match="images-00001.parquet is damaged .it is of other embeddings"):
        load_embeddings(tmp_path / "a")


def test_bad_folders_and_requests_are_one_line(tmp_path, bundle):
    (tmp_path / "notes.txt").write_text("mine")
    cases = [
        (lambda: fill(tmp_path, bundle, source_of()), "holds something else than embeddings; choose another"),
        (lambda: fill(tmp_path / "notes.txt" / "x", bundle, source_of()), "cannot write to"),
        (lambda: load_embeddings(tmp_path), "no embeddings in .*contrastive embed makes them"),
    ]
    silent = source_of(texts=[()] * 11)
    cases.append((lambda: fill(tmp_path / "a", bundle, silent, BOTH), "has no captions to embed as texts"))
    blind = replace(bundle, tokenizer=None)
    cases.append((lambda: fill(tmp_path / "b", blind, source_of(), BOTH), "no text tower; it embeds images only"))
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*.parquet")) == []


def _fill_on_rank(rank, world_size, port, folder, out):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    bundle, source = contrastive.load(folder), source_of(21, unreadable=(2, 9))
    store = claim(out, bundle, source)
    fill_store(store, bundle, source, BOTH, device="cpu", batch_size=3)
    if rank == 1:  # a fault of one rank is known to all: none waits for ever
        EmbeddingStore.write = _refuse
    again = claim(out + "-again", bundle, source)
    try:
        fill_store(again, bundle, source, BOTH, device="cpu")
    except UserError as error:
        Path(f"{out}-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def _refuse(*args, **options):
    raise UserError("rank 1 cannot write")


def test_two_ranks_write_what_one_does(tmp_path, folder, bundle, free_port):
    out = str(tmp_path / "two")
    torch.multiprocessing.start_processes(
        _fill_on_rank, (2, free_port, str(folder), out), nprocs=2, start_method="fork"
    )
    source = source_of(21, unreadable=(2, 9))
    fill(tmp_path / "one", bundle, source, BOTH)
    two, one = (load_embeddings(tmp_path / name, model_identity(bundle), source, parts=BOTH) for name in ("two", "one"))
    assert torch.equal(two.features, one.features) and torch.equal(two.texts.features, one.texts.features)
    assert two.keys == one.keys and two.texts.texts == one.texts.texts and two.skipped == one.skipped
    assert [Path(f"{out}-{rank}.txt").read_text() for rank in range(2)] == ["rank 1 cannot write"] * 2
