"""Sets known by name: from the cache, from torchvision, or one line that says what to do; and CIFAR's folders."""

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from refusals import refused
from set_writing import SMALL_SETS, THING_LABELS, THINGS, cifar10, cifar100, put, stl10
from torch.utils.data import DataLoader
from torchvision.datasets import cifar, fer2013, flowers102, svhn
from torchvision.datasets import stl10 as stl10_module

from contrastive.data.class_sets import class_set, class_sets
from contrastive.data.prompts import load_templates
from contrastive.data.sources import SOURCES, open_source
from contrastive.data.sources.open import held_out_spec
from contrastive.data.sources.torchvision_sets import SETS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision knows the checksums of the real files only."""
    for module in (cifar, fer2013, flowers102, stl10_module, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.fixture
def fetched(monkeypatch, unchecked):
    """Stands for the download of CIFAR-10: writes its files where the real one does, and notes the call."""
    calls = []

    def download(dataset):
        calls.append(dataset.root)
        cifar10(Path(dataset.root) / "cifar-10-batches-py")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    return calls


# The sets


def test_every_set_is_registered_and_named_in_one_way():
    assert SETS.keys() <= set(SOURCES.names()) and set(SOURCES.names()) - SETS.keys() >= {"scenes", "digits", "hf"}
    assert SMALL_SETS.keys() | {"pcam"} == SETS.keys()
    without_a_loader = {
        "cifar20",
        "coco",
        "digits",
        "imagenet",
        "imagenet1k",
        "imagewoof",
        "resisc45",
        "ucf101",
        "voc2007",
    }
    assert set(class_sets()) - SETS.keys() == without_a_loader


@pytest.mark.parametrize("name", SMALL_SETS)
def test_a_set_has_its_pictures_under_the_names_of_their_classes(name, cache, unchecked):
    write, split, images, names = SMALL_SETS[name]
    write(cache / name)
    source = open_source(f"{name}:{split}")
    stored = source.stored
    assert stored.name == f"{name}:{split}" and len(stored) >= len(images)
    assert [stored.class_names[stored.label(index)] for index in range(len(names))] == names
    for index, image in enumerate(images):
        found = stored[index].image
        assert found == image if isinstance(image, bytes) else (found == image.reshape(*image.shape[:2], -1)).all()
        assert stored[index].label == stored.label(index)
    assert len(source.captions(0)) > 1 and len({stored[index].key for index in range(len(stored))}) == len(stored)
    assert open_source(f"{name}:{split}").fingerprint == source.fingerprint
    assert len(list(DataLoader(stored, batch_size=None, num_workers=1))) == len(stored)
    if name in class_sets() and name != "cifar100":  # whose fake has classes of its own
        assert set(stored.class_names) == set(class_set(name).names)
        assert source.templates == load_templates(class_set(name).templates)


@pytest.mark.parametrize("name", SMALL_SETS)
def test_every_split_opens_and_the_first_is_the_default(name, cache, unchecked):
    SMALL_SETS[name][0](cache / name)
    first, *others = SETS[name].splits
    assert open_source(name).name == f"{name}:{first}"
    for split in others:
        if (name, split) != ("fer2013", "test"):
            assert len(open_source(f"{name}:{split}")) > 0
    refused(f"{name}:tset", f"{name}:tset: unknown split 'tset'; use {first}")


def test_pcam_is_read_from_its_two_files(cache, monkeypatch):
    """Without h5py, which torchvision asks for: a stand-in gives the arrays of its files."""
    pixels = np.arange(2 * 96 * 96 * 3, dtype=np.uint8).reshape(2, 96, 96, 3)
    contents = {"x": pixels, "y": np.array([1, 0]).reshape(2, 1, 1, 1)}

    class File(dict):
        def __init__(self, path):
            assert os.path.exists(path)
            key = "x" if str(path).endswith("x.h5") else "y"
            super().__init__({key: contents[key]})

        __enter__, __exit__ = lambda self: self, lambda self, *error: None

    monkeypatch.setitem(sys.modules, "h5py", None)
    (cache / "pcam").mkdir(parents=True)
    refused("pcam", "pcam:train cannot be read .*h5py")
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=File))
    for kind in "xy":
        put(cache / "pcam" / "pcam" / f"camelyonpatch_level_2_split_test_{kind}.h5")
    source = open_source("pcam:test")
    assert (source[1].image == pixels[1]).all() and [source.label(index) for index in (0, 1)] == [1, 0]
    assert source.class_names[1] == "lymph node tissue with a metastatic tumor"


def test_a_set_without_labels_says_so(cache, unchecked):
    put(cache / "fer2013" / "fer2013" / "test.csv", "pixels\n" + " ".join(["7"] * 48 * 48))
    refused("fer2013:test", "its files in .* have no labels")


def test_names_are_joined_not_counted(cache, unchecked):
    """A copy of STL-10 whose names stand in another order, and one without its file of names."""
    stl10(cache / "stl10")
    put(cache / "stl10" / "stl10_binary" / "class_names.txt", "\n".join(class_set("stl10").names[::-1]))
    source = open_source("stl10")
    assert [source.class_names[source.label(index)] for index in range(3)] == ["ship", "truck", "airplane"]
    os.remove(cache / "stl10" / "stl10_binary" / "class_names.txt")
    assert open_source("stl10").class_names == class_set("stl10").names


def test_names_that_nobody_knows_are_kept(cache, unchecked):
    stl10(cache / "stl10")
    put(cache / "stl10" / "stl10_binary" / "class_names.txt", "\n".join("abcdefghij"))
    assert open_source("stl10").class_names == tuple("abcdefghij")


# From a network, or without one


def test_fetched_once_then_read_from_the_cache(cache, fetched):
    train, test = open_source("cifar10"), open_source("cifar10:test")
    assert train.name == "cifar10:train" and (len(train), len(test)) == (10, 3)
    assert (train[4].image == THINGS[4]).all() and len(train.captions(0)) == 18
    assert {Path(root).name for root in fetched} == {"cifar10.part"}
    assert sorted(path.name for path in cache.iterdir()) == ["cifar10", "cifar10.lock"]


def test_files_put_into_the_cache_are_found_without_a_network(cache, fetched):
    cifar10(cache / "cifar10")
    assert len(open_source("cifar10:test")) == 3 and not fetched


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch, tmp_path):
    def fails(*given, **options):
        raise URLError("no route\nto host")

    for entry in SETS.values():
        monkeypatch.setattr(torchvision.datasets, entry.loader, fails)
    for spec in ("mnist", "fashion_mnist:test", "kmnist", "cifar10:train", "cifar100"):
        refused(spec, r"cannot be fetched \(.*no route.*\); give the folder of its files, as '/data/.*:train'")
    for name, entry in SETS.items():
        if entry.fetched and name not in ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100"):
            refused(name, rf"{name} cannot be fetched \(.*no route to host.*\); put its files into .*{name} as")
    refused(
        "fer2013", "torchvision has no address for it.; put its files into .*fer2013 as torchvision.datasets.FER2013"
    )
    monkeypatch.chdir(tmp_path)
    os.mkdir("mnist")
    refused("mnist", "give the folder of its files, as './mnist:train'")
    refused("mnist:tset", "mnist:tset: unknown split 'tset'; use train or test. Did you mean 'test'")
    refused("cifar1", "unknown data source 'cifar1'. Did you mean 'cifar10")
    os.mkdir("pets")
    refused("pets", "'pets' is a set's name and a folder here; give 'pets:trainval' or './pets'")
    assert not any(cache.glob("*[!.lock]"))


def test_a_download_cut_short_is_not_taken_for_the_set(cache, fetched, monkeypatch):
    def half(dataset):
        for name in ("data_batch_1", "test_batch"):
            put(os.path.join(dataset.root, "cifar-10-batches-py", name), b"half")
        raise RuntimeError("File not found or corrupted.")

    with monkeypatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "download", half)
        refused("cifar10", "File not found or corrupted")
    assert not (cache / "cifar10").exists()
    assert len(open_source("cifar10")) == 10 and fetched


def test_a_folder_that_holds_something_else_is_said_to(cache):
    put(cache / "food101" / "food-101.tar.gz")
    refused(
        "food101",
        "food101:train cannot be read .*food101 has to hold its files, unaltered, as torchvision.datasets.Food101",
    )


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch, fetched):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "file"))
    refused("cifar10", "cannot be kept in .*; set CONTRASTIVE_CACHE")


# CIFAR's files in a folder of one's own


def test_batches_become_pictures(tmp_path, unchecked):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    train, test = open_source(str(folder)), open_source(f"{folder}:test")
    assert (len(train), len(test)) == (10, 3) and train.class_names == class_set("cifar10").names
    for index in range(10):
        assert (train[index].image == THINGS[index]).all() and train[index].label == THING_LABELS[index]
    assert len(train.captions(0)) == 18 and train.captions(0)[0] == "a photo of a cat."
    assert len(open_source(str(tmp_path))) == 10  # the folder above
    assert held_out_spec(str(folder)) == f"{folder}:test"
    with pytest.raises(ValueError, match="read-only"):
        train[0].image[0] = 0


def test_cifar100_and_both_at_once(tmp_path, unchecked):
    source = open_source(str(cifar100(tmp_path / "one")), prompts="plain")
    assert (
        source.stored.templates is None and source.captions(0) == ("thing 99",) and (source[1].image == THINGS[1]).all()
    )
    (tmp_path / "one" / "classnames.txt").write_text("\n".join(f"beside {number}" for number in range(100)))
    assert open_source(str(tmp_path / "one")).class_names[99] == "beside 99"
    cifar10(tmp_path / "both" / "cifar-10-batches-py")
    cifar100(tmp_path / "both" / "cifar-100-python")
    refused(tmp_path / "both", "holds both CIFAR-10 and CIFAR-100; give one of")
    refused(f"{tmp_path}/one:val", "unknown split 'val'; use train or test")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_altered_pickle_is_refused_and_not_run(tmp_path):
    """Each of its files may be anybody's program: with other checksums than the author's, none is opened."""
    folder, canary = cifar10(tmp_path / "x"), tmp_path / "canary"
    for name in ("data_batch_2", "batches.meta"):
        put(folder / name, pickle.dumps({"data": Runs(str(canary)), "labels": [1]}, protocol=2))
    refused(folder, ".*x cannot be read .*; .*x has to hold its files, unaltered")
    assert not canary.exists()


def test_missing_and_damaged_batches(tmp_path, unchecked):
    folder = cifar10(tmp_path / "x")
    for content in (b"", b"<html>gone</html>", pickle.dumps([1, 2]), pickle.dumps({"labels": [1]})):
        put(folder / "data_batch_4", content)
        refused(folder, ".*x cannot be read .*; .*x has to hold its files, unaltered")
    os.remove(folder / "data_batch_4")
    refused(folder, ".*x cannot be read .*not found")
