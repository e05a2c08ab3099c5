"""Data sets by name: from the cache, from torchvision, or one line that says what to do; and held-out splits."""

import os
from pathlib import Path
from urllib.error import URLError

import pytest
import torchvision
from cifar_writing import IMAGES, write_cifar10
from refusals import refused

from contrastive.data.sources import open_source
from contrastive.data.sources.held_out import held_out_spec


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def fetched(monkeypatch):
    """Stands for torchvision.datasets.CIFAR10: writes its files where the real one does, and notes the call."""
    calls = []

    def fetch(root, download):
        calls.append(root)
        assert download
        write_cifar10(Path(root) / "cifar-10-batches-py")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    return calls


def test_fetched_once_then_read_from_the_cache(cache, fetched):
    train, test = open_source("cifar10"), open_source("cifar10:test")
    assert train.name == "cifar10:train" and (len(train), len(test)) == (10, 3)
    assert (train[4].image == IMAGES[4]).all() and len(train.captions(0)) == 18
    assert len(fetched) == 1 and sorted(path.name for path in cache.iterdir()) == ["cifar10", "cifar10.lock"]


def test_files_put_into_the_cache_are_found_without_a_network(cache, fetched):
    write_cifar10(cache / "cifar10")
    assert len(open_source("cifar10:test")) == 3 and not fetched


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch, tmp_path):
    def fails(root, download):
        raise URLError("no route\nto host")

    for name in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, fails)
    for spec in ("mnist", "fashion_mnist:test", "cifar10:train", "cifar100"):
        refused(spec, r"cannot be fetched \(.*no route.*\); give the folder of its files, as '/data/.*:train'")
    monkeypatch.chdir(tmp_path)
    os.mkdir("mnist")
    refused("mnist", "give the folder of its files, as './mnist:train'")
    refused("mnist:tset", "mnist:tset: unknown split 'tset'; use train or test. Did you mean 'test'")
    refused("cifar1", "unknown data source 'cifar1'. Did you mean 'cifar10")


def test_a_download_cut_short_is_not_taken_for_the_set(cache, fetched, monkeypatch):
    def half(root, download):
        os.makedirs(os.path.join(root, "cifar-10-batches-py"))
        for name in ("data_batch_1", "test_batch"):
            with open(os.path.join(root, "cifar-10-batches-py", name), "wb") as file:
                file.write(b"half")
        raise RuntimeError("File not found or corrupted.")

    with monkeypatch.context() as patch:
        patch.setattr(torchvision.datasets, "CIFAR10", half)
        refused("cifar10", "File not found or corrupted")
    assert not (cache / "cifar10").exists()
    assert len(open_source("cifar10")) == 10 and len(fetched) == 1


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch, fetched):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "file"))
    refused("cifar10", "cannot be kept in .*; set CONTRASTIVE_CACHE")


# Held-out splits


def test_held_out_splits_by_name():
    for scheme in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "scenes"):
        assert held_out_spec(scheme) == held_out_spec(f"{scheme}:train") == f"{scheme}:test"
        assert held_out_spec(f"{scheme}:test") is None
    assert held_out_spec("digits:all") is None and held_out_spec("digits,scenes") is None
    assert held_out_spec("") is None and held_out_spec("s3://bucket/train-{0..9}.tar") is None


def test_held_out_files_beside_the_training_files(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "val.parquet", "train.csv", "train-0.tar", "dev-0.tar"):
        (tmp_path / name).write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-*.parquet") == f"{tmp_path}/val.parquet"
    (tmp_path / "test-0.parquet").write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-*.parquet") == f"{tmp_path}/test-0.parquet"
    (tmp_path / "test-1.parquet").write_bytes(b"")
    assert held_out_spec(f"{tmp_path}/train-{{0..1}}.parquet") == f"{tmp_path}/test*.parquet"
    assert held_out_spec(f"{tmp_path}/train-0.tar") == f"{tmp_path}/dev-0.tar"
    assert held_out_spec(f"{tmp_path}/train.csv") is None
    assert held_out_spec(f"{tmp_path}/training.parquet") is None
    assert held_out_spec(f"{tmp_path}/none/train.parquet") is None


def test_held_out_folder_beside_the_training_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert held_out_spec(f"{tmp_path}/train") is None
    (tmp_path / "val").mkdir()
    assert held_out_spec(f"{tmp_path}/train/") == f"{tmp_path}/val"
    (tmp_path / "test").mkdir()
    assert held_out_spec(f"{tmp_path}/train") == f"{tmp_path}/test" and held_out_spec(f"{tmp_path}/test") is None


def test_held_out_split_of_a_saved_dataset(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert held_out_spec(f"{tmp_path}:train") == f"{tmp_path}:validation"
    assert held_out_spec(f"{tmp_path}:validation") is None
    import datasets

    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda path: ["train", "test"] if path == "me/a" else 1 / 0
    )
    assert held_out_spec("hf:me/a") == held_out_spec("hf:me/a:train") == "hf:me/a:test"
    assert held_out_spec("hf:me/b") is None and held_out_spec("hf:me/a:test") is None


def test_held_out_real_files(shared_data):
    spec = held_out_spec(f"{shared_data}/cifar10/train-*.parquet")
    assert len(open_source(spec)) == 10_000
    assert held_out_spec(f"{shared_data}/flickr8k/train-{{000000..000005}}.tar").endswith("dev-000000.tar")
