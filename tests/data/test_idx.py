"""MNIST's idx files, and every way they can be damaged."""

import gzip
import pickle
import struct
import time

import numpy as np
import pytest
from refusals import refused
from torch.utils.data import DataLoader

from contrastive.data.decode import decode
from contrastive.data.sources import open_source
from contrastive.data.sources.open import held_out_spec

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 5, 4), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def idx(values, magic=None):
    return struct.pack(f">{1 + values.ndim}I", magic or 2048 + values.ndim, *values.shape) + values.tobytes()


def write(folder, images=IMAGES, labels=LABELS, prefix="train", pack=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        if pack:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return folder


@pytest.mark.parametrize("pack", [False, True])
def test_both_splits_plain_and_packed(tmp_path, pack):
    folder = write(tmp_path / "mnist", pack=pack)
    write(folder, IMAGES[:3], LABELS[:3], "t10k", pack)
    train, test = open_source(str(folder)), open_source(f"{folder}:test")
    assert (len(train), len(test)) == (12, 3) and train.fingerprint != test.fingerprint
    assert open_source(f"{folder}:train").fingerprint == train.fingerprint
    record = train[11]
    assert record.image.shape == (5, 4, 3) and record.image.dtype == np.uint8
    assert (record.image == IMAGES[11][:, :, None]).all() and record.label == train.label(11) == 1
    assert train.class_names[3] == "three" and "the digit one." in train.captions(11)
    assert decode(record.image).shape == (3, 5, 4)
    assert held_out_spec(str(folder)) == held_out_spec(f"{folder}:train") == f"{folder}:test"
    assert held_out_spec(f"{folder}:test") is None


def test_other_names_folders_and_workers(tmp_path):
    folder = write(tmp_path / "x" / "raw")
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("-idx", ".idx"))
    source = open_source(str(tmp_path / "x"), prompts="plain")
    assert len(source) == 12 and pickle.loads(pickle.dumps(source))[5].captions == ("five",)
    loaded = list(DataLoader(source, sampler=range(12), batch_size=None, num_workers=2))
    assert all((sample.image == source[i].image).all() for i, sample in enumerate(loaded))
    with pytest.raises(IndexError):
        source[12]


def test_the_folder_tells_the_classes(tmp_path):
    def names(*parts):
        return open_source(str(write(tmp_path.joinpath(*parts)))).class_names

    assert names("FashionMNIST", "raw")[0] == names("fashion")[0] == "T-shirt or top"
    assert names("kmnist")[9] == "wo"
    assert names("my fashion", "mnist") == names("anything")
    folder = write(tmp_path / "fashion")
    (folder / "classnames.txt").write_text("\n".join("abcdefghij"))
    assert open_source(str(folder)).class_names == tuple("abcdefghij")
    assert open_source(str(write(tmp_path / "FashionMNIST"))).captions(0)[0] == "a photo of a T-shirt or top."


def test_damage_is_one_line_with_the_file_and_the_figures(tmp_path):
    folder = write(tmp_path / "mnist", pack=True)
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:-30])
    refused(folder, "train-images-idx3-ubyte.gz is damaged or cut short .*end-of-stream")
    images.write_bytes(whole[:60] + b"\0\0\0" + whole[63:])
    refused(folder, "train-images-idx3-ubyte.gz is damaged or cut short")
    images.write_bytes(b"<html>not found</html>")
    refused(folder, "is damaged or cut short .*Not a gzipped file")
    images.write_bytes(gzip.compress(idx(IMAGES)[:-7]))
    refused(folder, "its header tells of 12 x 5 x 4 = 240 bytes, but it holds 233")
    images.write_bytes(gzip.compress(idx(IMAGES) + b"x"))
    refused(folder, "240 bytes, but it holds more")
    images.write_bytes(gzip.compress(struct.pack(">4I", 2051, 2**31, 2**15, 2**15)))
    refused(folder, "its header tells of .*, but it holds 0")
    images.write_bytes(gzip.compress(idx(IMAGES, magic=2050)))
    refused(folder, "starts with 2050; an idx file of this kind starts with 2051")
    images.write_bytes(gzip.compress(b"\0\0\x08"))
    refused(folder, "is damaged or cut short")
    images.write_bytes(gzip.compress(b""))
    refused(folder, "is empty")
    images.write_bytes(gzip.compress(idx(IMAGES[:0])))
    refused(folder, "is empty: its header tells of 0 x 5 x 4")
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(idx(LABELS[:11])))
    refused(folder, "has 12 images, but train-labels-idx1-ubyte.gz 11 labels")
    labels.write_bytes(gzip.compress(idx(LABELS + 20)))
    refused(folder, "label 29, but there are 10 class names; put the names in a classes.json")
    labels.unlink()
    refused(folder, "no train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz in ")


def test_wrong_splits(tmp_path):
    folder = write(tmp_path / "mnist")
    refused(f"{folder}:tset", "unknown split 'tset'; use train or test. Did you mean 'test'")
    refused(f"{folder}:test", "there is no t10k-images-idx3-ubyte")


def test_real_mnist(shared_data):
    train, test = open_source(f"{shared_data}/mnist"), open_source(f"{shared_data}/mnist:test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert [test.label(index) for index in range(5)] == [7, 2, 1, 0, 4]
    assert np.bincount([train.label(index) for index in range(60_000)]).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    start = time.process_time()
    for index in range(0, 60_000, 12):
        test_image = train[index].image
    assert test_image.shape == (28, 28, 3)
    assert time.process_time() - start < 1  # 5,000 a second on one core
