"""Digits, scenes, folders, and every way to name a source wrongly."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader

from contrastive.commands import embed_command, inspect_command, shard_command
from contrastive.data.record import BadSample, FaultCounts
from contrastive.data.sources import SOURCES, announce, open_source
from contrastive.data.sources.arrays import Digits
from contrastive.data.sources.columns import check_columns
from contrastive.errors import UserError

# Digits


def test_digits_are_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    scans, source = load_digits(), Digits("all")
    assert len(source) == 1797 and source.class_names[7] == "seven"
    record = source[100]
    assert record.image.dtype == np.uint8 and record.image.shape == (8, 8, 3)
    assert np.abs(record.image[:, :, 1] / 255 * 16 - scans.images[100]).max() < 0.04
    assert record.image.max() == 255 and record.label == scans.target[100]


def test_digits_splits_are_stratified_and_apart():
    train, test = Digits("train"), Digits("test")
    keys = [{split[index].key for index in range(len(split))} for split in (train, test)]
    assert (len(train), len(test)) == (1442, 355) and not keys[0] & keys[1]
    counts = np.bincount([test.label(index) for index in range(len(test))])
    assert counts.min() >= 34 and counts.max() <= 37
    assert len({train.fingerprint, test.fingerprint, Digits("all").fingerprint}) == 3


def test_digits_become_pairs_by_templates(tmp_path):
    source = open_source("digits:test")
    captions = source.captions(0)
    assert source.name == "digits:test" and len(captions) == len(set(captions)) >= 10
    name = source.class_names[source.label(0)]
    assert all(name in caption for caption in captions) and source[0].captions == captions
    assert open_source("digits:test", prompts="plain").captions(0) == (name,)
    own = tmp_path / "own.txt"
    own.write_text("number {}\n")
    other = open_source("digits:test", prompts=str(own))
    assert other.captions(0) == (f"number {name}",) and other.fingerprint != source.fingerprint


def test_index_outside_the_source():
    source = open_source("digits")
    for index in (-1, len(source)):
        for read in (source.__getitem__, source.captions, source.label):
            with pytest.raises(IndexError, match="digits:train"):
                read(index)


# Scenes keep their own captions unless prompts are asked for


def test_scenes_by_name():
    assert open_source("scenes:val").name == "scenes:val" and open_source("scenes").class_names is None
    own = open_source("scenes:test")
    asked = open_source("scenes:test", prompts="plain")
    assert asked.captions(3) == (own.class_names[own.label(3)],) != own.captions(3)
    assert open_source("scenes:val", prompts="plain").captions(0) == open_source("scenes:val").captions(0)


# Folders


def test_class_folders(tmp_path):
    for path in (
        "polar_bear/1.jpg",
        "polar_bear/more/2.PNG",
        "ape/3.webp",
        ".cache/4.jpg",
        "ape/.5.jpg",
        "ape/notes.md",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    source = open_source(str(tmp_path))
    assert source.class_names == ("ape", "polar_bear") and len(source) == 3
    assert [source[index].key for index in range(3)] == ["ape/3.webp", "polar_bear/1.jpg", "polar_bear/more/2.PNG"]
    assert source[2].image == b"polar_bear/more/2.PNG" and source[2].label == 1
    assert source.captions(1)[0] == "a photo of a polar bear."
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    before = source.fingerprint
    (tmp_path / "ape" / "6.jpg").write_bytes(b"")
    assert open_source(str(tmp_path)).fingerprint != before
    os.remove(tmp_path / "polar_bear" / "1.jpg")
    with pytest.raises(BadSample, match="missing_image"):
        source[1]


def test_columns_of_data_that_have_none_are_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("image,text\nbeside/1.jpg,a cat\n")
    for folder in ("cat", "dog"):
        (tmp_path / "classes" / folder).mkdir(parents=True)
        (tmp_path / "classes" / folder / "1.jpg").touch()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "1.jpg").touch()
    (tmp_path / "beside" / "1.txt").write_text("a cat")
    table, classes, beside = (open_source(str(tmp_path / name)) for name in ("a.csv", "classes", "beside"))
    check_columns([table], {"image_column": "image", "caption_column": "text"})
    check_columns([beside], {"image_column": None, "caption_column": "txt"})
    check_columns([classes, table], {"data.image_column": "image"})
    with pytest.raises(UserError, match="^caption_column has no effect: .*classes has no texts to choose from; leave"):
        check_columns([classes], {"caption_column": "title"})
    with pytest.raises(UserError, match="^data.image_column has no effect: .*beside has no columns; leave it out"):
        check_columns([beside], {"data.image_column": "path"})


def test_scripts_say_so_too(tmp_path):
    told = "caption_column has no effect: digits:train has no texts to choose from"
    out = str(tmp_path / "out")
    for script, output in ((inspect_command, ["--out", out]), (shard_command, [out])):
        with pytest.raises(UserError, match=told):
            script.main(["digits", *output, "--caption_column", "title"])
    with pytest.raises(UserError, match=told):
        embed_command.main(["RUN", "digits", out, "--caption-column", "title"])
    assert not os.path.exists(out)


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("ape", "bear"):
        (tmp_path / "real" / name).mkdir(parents=True)
        (tmp_path / "real" / name / "1.jpg").write_bytes(b"")
    (tmp_path / "real" / "ape" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(open_source(str(tmp_path / "link"))) == 2


def test_captions_beside_images(images):
    (images / "a.txt").write_text("a bird\n")
    (images / "b.txt").write_bytes(b"\xff\xfe")
    (images / "deep").mkdir()
    (images / "deep" / "d.jpg").write_bytes(b"d")
    (images / "deep" / "d.txt").write_text(" \r\n")
    source = open_source(str(images))
    assert source.class_names is None and len(source) == 4
    assert source[0].captions == ("a bird",) and source.captions(2) == () and source.captions(3) == (" ",)
    with pytest.raises(BadSample, match="bad_utf8") as caught:
        source[1]
    assert caught.value.key == "b.jpg"
    loader = DataLoader(source, sampler=[0, 2, 3], batch_size=None, num_workers=1)
    assert list(loader) == [source[0], source[2], source[3]]


def test_bad_folder_is_refused(images):
    refused(images, "neither captions .* nor class folders: 3 of 3 lie in no sub-folder")
    (images / "empty").mkdir()
    refused(images / "empty", "no images in this folder")
    (images / "empty" / "x-0.tar").write_bytes(b"")
    refused(images / "empty", r"but \.tar files; give '.*\*\.tar'")
    (images / "one" / "birds").mkdir(parents=True)
    os.rename(images / "a.jpg", images / "one" / "birds" / "a.jpg")
    refused(images / "one", r"one class folder only \('birds'\)")
    (images / "net" / "train" / "ape").mkdir(parents=True)
    os.rename(images / "b.jpg", images / "net" / "train" / "ape" / "b.jpg")
    refused(images / "net", r"its folders are splits \(train\); give one, as '.*/net/train'")


# Specifications


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no data source is given; use one of: scenes"),
        ("scnes", "unknown data source 'scnes'. Did you mean 'scenes'"),
        ("digts:test", "unknown data source 'digts'. Did you mean 'digits'"),
        ("nothinglikeit", "unknown data source 'nothinglikeit'. Forms: scenes"),
        ("digits:tets", "unknown split 'tets'.* Did you mean 'test'"),
        ("scenes:tets", "unknown split 'tets'"),
        ("s3://bucket/x.tar", "1 of its 1 shards have no index yet; run `contrastive index"),
        ("hf://datasets/me/birds/x.tar", "1 of its 1 shards have no index yet; run `contrastive index"),
        ("pipe:touch canary", "not read; use local files"),
        ("/no/such/folder/x.tar", "no file or folder '/no/such/folder/x.tar': there is no folder '/no/such/folder'"),
    ],
)
def test_wrong_specification(spec, message):
    refused(spec, message)


def test_wrong_path(images):
    (images / "x-0.tar").write_bytes(b"")
    (images / "x.csv").write_text("image,text\n")
    refused(images / "y-*.tar", "no file matches '.*y-.*tar'")
    refused(images / "x-1.tar", "no file or folder .* Did you mean 'x-0.tar'")
    refused(f"{images}/x-{{0..3}}.tar", "3 of its 4 files are missing, first '.*x-1.tar'")
    refused(f"{images}/x-{{0..3.tar", "a brace is not closed")
    refused(images / "a.jpg", "files of kind '.jpg' are not read")
    refused(images / "x*", r"several kinds \(.csv, .tar\)")
    refused(f"{images}:train", "only a folder saved by datasets, or of MNIST or CIFAR, has splits")
    (images / "train").mkdir()
    refused(f"{images}:train", f"has splits; give '{images}/train'")


def test_unknown_prompts_are_refused_at_the_start():
    refused("scenes", "no prompt templates 'photos': .* Did you mean 'photo'", prompts="photos")


def test_scheme_of_another_package(monkeypatch):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @SOURCES.register("upper")
    def open_upper(argument, columns):
        source = Digits(argument)
        source.class_names = tuple(name.upper() for name in source.class_names)
        return source

    source = open_source("upper:test", prompts="plain")
    assert source.captions(0)[0].isupper()
    refused("uper:test", "Did you mean 'upper'")


# What was read as what


def test_a_source_says_what_it_was_taken_for(tmp_path, capsys):
    for place in ("one/a.png", "two/b.png"):
        (tmp_path / place).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    announce(open_source(str(tmp_path)))
    assert capsys.readouterr().err == f"{tmp_path}: 2 samples; 2 class folders\n"
    table = tmp_path / "pairs.csv"
    table.write_text("image,title\none/a.png,a dog\n")
    source = open_source(str(table))
    source.left_aside = FaultCounts(not_an_image={"count": 2, "keys": ["readme.md", "x.pdf"]})
    announce(source)
    said = "1 samples; image: column 'image', caption: column 'title'; left aside: 2 not_an_image, as 'readme.md'"
    assert capsys.readouterr().err == f"{table}: {said}\n"
