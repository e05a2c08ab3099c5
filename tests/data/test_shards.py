"""WebDataset shards: right members for every sample, in every process."""

import json
import os
import pickle
import tarfile
import time

import pytest
import webdataset
from refusals import refused
from shard_writing import pairs, refusal, write_tar
from torch.utils.data import DataLoader

from contrastive.data.record import BadSample
from contrastive.data.shards.indexing import index_shard
from contrastive.data.shards.tar_members import iter_members, split_key
from contrastive.data.sources import open_source
from contrastive.errors import UserError

# Real shards


def test_real_shards_equal_tarfile(shared_data):
    source = open_source(f"{shared_data}/flickr8k/train-*.tar")
    assert len(source) == 6000 and source.class_names is None
    with tarfile.open(shared_data / "flickr8k" / "train-000003.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for index in (3000, 3001, 3517, 3999):
        record = source[index]
        shard, key = record.key.split("/")
        assert shard == "train-000003.tar"
        assert record.image == members[f"{key}.jpg"]
        assert list(record.captions) == json.loads(members[f"{key}.json"])["captions"]
        assert source.captions(index) == record.captions and source.label(index) is None


def test_real_shards_equal_the_webdataset_library(shared_data):
    shard = str(shared_data / "flickr8k" / "dev-000000.tar")
    source = open_source(shard)
    theirs = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert len(theirs) == len(source) == 1000
    for index, sample in enumerate(theirs):
        record = source[index]
        assert record.key.endswith(sample["__key__"]) and record.image == sample["jpg"]


def test_braces_and_globs_name_the_same_data(shared_data):
    glob = open_source(f"{shared_data}/flickr8k/train-*.tar")
    braces = open_source(f"{shared_data}/flickr8k/train-{{000000..000005}}.tar")
    fewer = open_source(f"{shared_data}/flickr8k/train-{{000000..000001}}.tar")
    assert len(fewer) == 2000
    assert braces.fingerprint == glob.fingerprint != fewer.fingerprint


def test_indexing_is_quick(shared_data):
    started = time.perf_counter()
    open_source(f"{shared_data}/flickr8k/train-*.tar")
    assert time.perf_counter() - started < 1


# What others write


def test_shard_written_by_webdataset(tmp_path):
    path = tmp_path / "w-000000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(5):
            writer.write(
                {"__key__": f"sub/{index:04d}", "png": b"png%d" % index, "json": {"caption": f"c{index}"}, "cls": index}
            )
    source = open_source(str(path))
    assert [source.label(index) for index in range(5)] == [0, 1, 2, 3, 4]
    assert source[3].image == b"png3" and source[3].captions == ("c3",) and source[3].label == 3
    assert source[3].key == "w-000000.tar/sub/0003"


def test_img2dataset_layout_reads_the_caption_among_other_fields(tmp_path):
    fields = {"caption": "a cat", "url": "http://x", "key": "0", "status": "success", "label": None}
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"j"), ("0.json", json.dumps(fields).encode()), ("0.txt", b"t")])
    assert open_source(path).captions(0) == ("a cat",)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_every_tar_format(tmp_path, format):
    folder = "d" * 60 if format == tarfile.USTAR_FORMAT else "ü" * 120
    path = write_tar(tmp_path / "long.tar", pairs(f"{folder}/{'k' * 90}0", f"{folder}/{'k' * 90}1"), format)
    source = open_source(path)
    assert len(source) == 2
    assert source[1].key == f"long.tar/{folder}/{'k' * 90}1" and source[1].image.endswith(b"1")
    with tarfile.open(path) as tar:
        expected = [(member.name.encode(), member.offset_data, member.size) for member in tar]
    assert [member[:3] for member in iter_members(path)] == expected


# Grouping and captions


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (b"a/b.c/x.y.JPG", (b"a/b.c/x", b"y.jpg")),
        (b"x.jpg", (b"x", b"jpg")),
        (b".hidden.jpg", None),
        (b"README", None),
    ],
)
def test_key_is_all_up_to_the_first_dot_of_the_base_name(name, parts):
    assert split_key(name) == parts


def test_captions_prefer_json_then_text_and_stay_as_stored(tmp_path):
    members = [
        ("a.jpg", b"A"), ("a.json", b'{"captions": ["one", " ", "two "]}'), ("a.txt", b"text"),
        ("b.jpg", b"B"), ("b.json", b'{"width": 3}'), ("b.txt", "\ufeff caf\u00e9 \n".encode()),
        ("c.jpg", b"C"),
        ("d.jpg", b"D"), ("d.txt", b"\xff\xfe"),
        ("e.jpg", b"E"), ("e.json", b"{broken"),
        ("f.jpg", b"F"), ("f.json", b'{"captions": [1]}'),
        ("g.txt", b"no image"),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert source.captions(0) == ("one", " ", "two ")
    assert source.captions(1) == (" caf\u00e9 ",)
    assert source[2].captions == ()
    assert [refusal(source, index) for index in (3, 4, 5, 6)] == [
        "bad_utf8",
        "bad_json",
        "bad_caption",
        "missing_image",
    ]
    with pytest.raises(BadSample, match="bad_utf8") as caught:
        source.captions(3)
    assert caught.value.key == "x.tar/d"


def test_caption_column_names_the_json_field(tmp_path):
    fields = json.dumps({"caption": "alt", "dense": "a long one"}).encode()
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.json", fields)])
    assert open_source(path, caption_column="dense").captions(0) == ("a long one",)
    with pytest.raises(UserError, match="no caption field 'dens' in the JSON .* caption, dense"):
        open_source(path, caption_column="dens")


def test_base_names_that_repeat_in_folders_give_unique_keys(tmp_path):
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", pairs("k"))
    source = open_source(f"{tmp_path}/*/0.tar")
    assert [source[0].key, source[1].key] == ["p/0.tar/k", "q/0.tar/k"]


def test_too_large_text_is_refused(tmp_path):
    source = open_source(write_tar(tmp_path / "x.tar", [*pairs("a"), ("b.jpg", b"B"), ("b.txt", b"x" * (2 << 20))]))
    assert refusal(source, 1) == "too_large"


# Labels


def test_labels_become_prompts_where_class_names_lie_beside(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.cls", b"1\n"), ("b.jpg", b"B"), ("b.cls", b"jay")])
    bare = open_source(path)
    assert bare.class_names is None and bare.label(0) == 1 and bare.captions(0) == ()
    (tmp_path / "classes.json").write_text('["jay", "wren"]')
    source = open_source(path, prompts="plain")
    assert source.class_names == ("jay", "wren")
    assert [source.label(0), source.label(1)] == [1, 0]
    assert source[0].captions == ("wren",)
    (tmp_path / "classes.json").write_text('["jay"]')
    with pytest.raises(BadSample, match="bad_label"):
        open_source(path).label(0)


@pytest.mark.parametrize("member", [("cls", b"cat\n"), ("cls", b"1.0"), ("json", b'{"label": "cat"}')])
def test_labels_that_are_names_need_a_list_of_them(tmp_path, member):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), (f"a.{member[0]}", member[1])])
    refused(
        path, r"x.tar has labels that are no whole numbers, as '(cat|1.0)'; put classes.json or classnames.txt with"
    )
    write_tar(tmp_path / "pairs.tar", [("a.jpg", b"A"), ("a.txt", b"one"), ("a.cls", b"cat")])
    pairs = open_source(str(tmp_path / "pairs.tar"))
    assert pairs.label(0) is None and pairs.reading.endswith("not read: labels that are no whole numbers, as 'cat'")
    (tmp_path / "classnames.txt").write_text("dog\ncat\n1.0\n")
    assert open_source(path).label(0) in (1, 2)


def test_labels_from_one_are_refused_for_a_list_of_names(tmp_path):
    members = [(f"{number}.{end}", str(number).encode()) for number in (1, 2, 3) for end in ("jpg", "cls")]
    path = write_tar(tmp_path / "x.tar", members)
    (tmp_path / "classnames.txt").write_text("ape\ncat\ndog\n")
    refused(path, "x.tar has labels from 1 to 3, and .*classnames.txt has 3 names, which are for labels from 0 up")
    (tmp_path / "classnames.txt").write_text("none\nape\ncat\ndog\n")
    assert open_source(path).label(0) == 1


def test_labels_in_the_json(tmp_path):
    members = [
        ("a.jpg", b"A"),
        ("a.json", b'{"label": 1, "caption": "c"}'),
        ("b.jpg", b"B"),
        ("b.json", b'{"label": 1.5}'),
    ]
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert source[0].label == 1 and source[0].captions == ("c",)
    assert refusal(source, 1) == "bad_label"


def test_a_label_below_0_is_none_as_in_tables(tmp_path):
    members = [
        (name, data)
        for key, label in (("a", b"1"), ("b", b"-1"), ("c", b" 0\n"), ("d", b"1.5"))
        for name, data in ((f"{key}.jpg", key.encode()), (f"{key}.cls", label), (f"{key}.txt", b"text"))
    ]
    source = open_source(write_tar(tmp_path / "x.tar", members))
    assert [source[index].label for index in range(3)] == [1, None, 0]
    assert source[1].captions == ("text",)  # a sample without a label has its caption still
    assert refusal(source, 3) == "bad_label"


# Processes


def test_index_is_compact(shared_data):
    index, _ = index_shard(str(shared_data / "flickr8k" / "dev-000000.tar"))
    assert len(pickle.dumps(index)) < 80 * len(index)


@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_the_same_bytes(shared_data, context, num_workers):
    source = open_source(f"{shared_data}/flickr8k/dev-*.tar")
    order = list(range(0, 1000, 50))
    here = [source[index] for index in order]  # the file is open before the fork
    loader = DataLoader(
        source, sampler=order, batch_size=None, num_workers=num_workers, multiprocessing_context=context
    )
    assert list(loader) == here


def test_forked_process_reads_the_same_bytes(shared_data):
    source = open_source(f"{shared_data}/flickr8k/dev-*.tar")
    expected = source[0]
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"same" if all(source[0] == expected for _ in range(50)) else b"other")
        os._exit(0)
    assert all(source[0] == expected for _ in range(50))
    os.waitpid(child, 0)
    assert os.read(reader, 8) == b"same"


def test_many_shards_do_not_exhaust_descriptors(tmp_path):
    for number in range(200):
        write_tar(tmp_path / f"x-{number:03d}.tar", pairs(f"{number}"))
    source = open_source(f"{tmp_path}/x-{{000..199}}.tar")
    before = len(os.listdir("/proc/self/fd"))
    assert [source[index].captions[0] for index in range(200)] == [f"txt of {index}" for index in range(200)]
    assert len(os.listdir("/proc/self/fd")) - before <= 128
