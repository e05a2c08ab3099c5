"""CIFAR's pickled batches: read as they are, and never run."""

import os
import pickle
import time

import numpy as np
import pytest
from cifar_writing import IMAGES, LABELS, NAMES, python2_pickle, python3_pickle, rows, write_cifar10
from refusals import refused

from contrastive.data.sources import open_source
from contrastive.data.sources.array_pickle import read_array_pickle
from contrastive.data.sources.held_out import held_out_spec


def test_the_test_writes_what_python_reads():
    batch = {"labels": LABELS, "data": rows(IMAGES), "label_names": NAMES}
    for write in (python2_pickle, *map(python3_pickle, (2, 5))):
        read = pickle.loads(write(batch), encoding="bytes")
        assert read[b"labels"] == LABELS and (read[b"data"] == rows(IMAGES)).all()


@pytest.mark.parametrize("write", [python2_pickle, *map(python3_pickle, (2, 3, 4, 5))])
def test_batches_become_pictures(tmp_path, write):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", write)
    train, test = open_source(str(folder)), open_source(f"{folder}:test")
    assert (len(train), len(test)) == (10, 3) and train.class_names == tuple(NAMES)
    for index in range(10):
        assert (train[index].image == IMAGES[index]).all() and train[index].label == LABELS[index]
    assert len(train.captions(0)) == 18 and train.captions(0)[0] == "a photo of a cat."
    assert len(open_source(str(tmp_path))) == 10  # the folder above
    assert held_out_spec(str(folder)) == f"{folder}:test"


def test_a_picture_is_a_view_that_nobody_can_write_to(tmp_path):
    image = open_source(str(write_cifar10(tmp_path / "x")))[0].image
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


def test_cifar100_and_columns_first(tmp_path):
    names = [f"thing_{number}" for number in range(100)]
    batch = {"fine_labels": [99, 0], "coarse_labels": [1, 2], "data": np.asfortranarray(rows(IMAGES[:2]))}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    (tmp_path / "meta").write_bytes(python2_pickle({"fine_label_names": names, "coarse_label_names": ["a"]}))
    source = open_source(str(tmp_path), prompts="plain")
    assert source.captions(0) == ("thing 99",) and (source[1].image == IMAGES[1]).all()
    os.remove(tmp_path / "meta")
    assert open_source(f"{tmp_path}:train").class_names[99] == "worm"
    write_cifar10(tmp_path / "both" / "cifar-10-batches-py")
    os.mkdir(tmp_path / "both" / "cifar-100-python")
    for name in ("train", "test"):
        os.rename(tmp_path / name, tmp_path / "both" / "cifar-100-python" / name)
    refused(tmp_path / "both", "holds both CIFAR-10 and CIFAR-100; give one of")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path):
    folder, canary = write_cifar10(tmp_path / "x"), tmp_path / "canary"
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Runs(str(canary)), "labels": [1]}, protocol=2))
    refused(folder, r"data_batch_2 asks for (posix|nt)\.mkdir, which no data need; nothing of it was run")
    for name in ("builtins\neval", "numpy\nload", "numpy.core.multiarray\nscalar", "os\nsystem", "builtins\ngetattr"):
        (folder / "data_batch_2").write_bytes(b"\x80\x02c" + name.encode() + b"\n(U\x011tR.")
        refused(folder, "data_batch_2 asks for " + name.replace("\n", "."))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_pickle({"labels": [1], "data": rows(IMAGES[:1])})[:-200], "is damaged or no pickle of arrays"),
        (b"", "is damaged or no pickle"),
        (b"<html>gone</html>", "is damaged or no pickle"),
        (pickle.dumps([1, 2]), "is damaged or no pickle"),
        (pickle.dumps({"labels": [1], "data": np.zeros((1, 3072))}), "an array of 'f8', not of unsigned bytes"),
        (pickle.dumps({"labels": [1], "data": np.array([None])}, protocol=2), "an array of 'O8'"),
        (python2_pickle({"labels": [1], "data": rows(IMAGES[:1])[:, :99]}), r"must be N x 3072 .* is \(1, 99\)"),
        (python2_pickle({"labels": [1]}), "must be N x 3072 unsigned bytes, but is NoneType"),
        (python2_pickle({"labels": [1, 2], "data": rows(IMAGES[:1])}), "has 1 images, but 2 labels"),
        (python2_pickle({"labels": [10], "data": rows(IMAGES[:1])}), "labels from 10 to 10, but there are 10 class"),
        (python2_pickle({"labels": [-1], "data": rows(IMAGES[:1])}), "labels from -1 to -1"),
        (python2_pickle({"labels": ["1"], "data": rows(IMAGES[:1])}), "'labels' must be a list of whole numbers"),
    ],
)
def test_damaged_batches(tmp_path, content, message):
    folder = write_cifar10(tmp_path / "x")
    (folder / "data_batch_4").write_bytes(content)
    refused(folder, f"data_batch_4.*{message}")


def test_missing_files_and_names(tmp_path):
    folder = write_cifar10(tmp_path / "x")
    os.remove(folder / "data_batch_3")
    refused(folder, "1 of its 5 files are missing in .*x, first data_batch_3")
    refused(f"{folder}:val", "unknown split 'val'; use train or test")
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": 3}))
    refused(f"{folder}:test", "has no list of class names 'label_names'")


def test_arrays_survive_every_protocol(tmp_path):
    for protocol in range(2, 6):
        (tmp_path / "x").write_bytes(pickle.dumps({"a": IMAGES, "b": "Grüße", "c": b"\xff\0"}, protocol=protocol))
        read = read_array_pickle(str(tmp_path / "x"))
        assert (read["a"] == IMAGES).all() and read["b"] == "Grüße" and read["c"] == b"\xff\0"


def test_reading_is_quick(tmp_path):
    source = open_source(str(write_cifar10(tmp_path / "x")))
    start = time.process_time()
    for place in range(5000):
        assert source[place % 10].image.shape == (32, 32, 3)
    assert time.process_time() - start < 1
