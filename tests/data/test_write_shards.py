"""Any source as shards: what is stored, what is refused, and that a second run goes on where the first ended."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from launching import ROOT, environment
from PIL import Image
from shard_writing import write_tar

from contrastive.commands.shard_command import main
from contrastive.data.captions import MAX_CAPTION_CHARS
from contrastive.data.decode import decode
from contrastive.data.shards.shard_writing import PackOptions, write_shards
from contrastive.data.sources import open_source
from contrastive.errors import UserError


def encoded(kind, height, width, seed=0):
    """A smooth picture as a file."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(data, kind)
    return data.getvalue()


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def all_members(folder):
    return {name: data for path in sorted(folder.glob("*.tar")) for name, data in members_of(path).items()}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture
def table(tmp_path):
    """Ten captioned images of all kinds, the last three of no use."""
    folder = tmp_path / "in"
    folder.mkdir()
    images = [encoded("JPEG", 40 + 8 * n, 60, n) for n in range(4)]
    images += [encoded("PNG", 20, 30), encoded("WEBP", 20, 30), encoded("GIF", 20, 30)]
    images += [encoded("JPEG", 300, 300)[:-2000], b"<html>not found</html>", encoded("JPEG", 9, 9)]
    rows = []
    for number, data in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(data)
        rows.append({"image": f"{number}.jpg", "caption": [f"caption {number}"]})
    rows[1]["caption"] = ["one", "  ", "x" * (MAX_CAPTION_CHARS + 1), "two"]
    rows[2]["caption"] = ["ends in a line\n"]
    rows[9]["caption"] = [" "]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_each_sample_is_stored_once_and_the_unusable_are_counted(table, tmp_path, capsys):
    report = write_shards(open_source(str(table)), tmp_path / "out", samples_per_shard=4, workers=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")) == [
        "00000.tar",
        "00001.tar",
        "report.json",
    ]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == 7 and report["resized"] == 0
    assert report["rejected"] == {
        "unreadable_image": {"count": 2, "keys": ["pairs.jsonl:7", "pairs.jsonl:8"]},
        "empty_caption": {"count": 1, "keys": ["pairs.jsonl:9"]},
    }
    assert report["rejected_captions"] == {
        "empty_caption": {"count": 1, "keys": ["pairs.jsonl:1"]},
        "caption_too_long": {"count": 1, "keys": ["pairs.jsonl:1"]},
    }
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    said = capsys.readouterr().err
    assert "rejected 3 of 10 samples" in said and "2 unreadable_image: pairs.jsonl:7, pairs.jsonl:8\n" in said

    members = all_members(tmp_path / "out")
    assert [name for name in members if name.startswith("000000001")] == [
        f"000000001.{suffix}" for suffix in ("jpg", "json", "txt")
    ]
    for number, suffix in enumerate(["jpg"] * 4 + ["png", "webp"]):
        assert members[f"{number:09d}.{suffix}"] == (table.parent / f"{number}.jpg").read_bytes()
    assert members["000000000.txt"] == b"caption 0" and "000000000.json" not in members
    # A GIF is not what open_clip and webdataset read: it becomes a PNG of the same pixels.
    gif, png = decode((table.parent / "6.jpg").read_bytes()), decode(members["000000006.png"])
    assert (gif == png).all()


def test_shards_read_back_the_same_captions_and_images(table, tmp_path):
    source = open_source(str(table))
    write_shards(source, tmp_path / "out", samples_per_shard=4, workers=1)
    shards = open_source(str(tmp_path / "out" / "{00000..00001}.tar"))
    assert len(shards) == 7 and (tmp_path / "out" / ".contrastive-index").is_dir()
    for number in range(6):
        assert shards[number].image == source[number].image
    assert shards.captions(0) == source.captions(0)
    assert shards.captions(1) == ("one", "two")
    assert shards.captions(2) == ("ends in a line\n",)


def test_the_webdataset_library_reads_them(table, tmp_path):
    write_shards(open_source(str(table)), tmp_path / "out", samples_per_shard=4, workers=1)
    shards = str(tmp_path / "out" / "{00000..00001}.tar")
    pipeline = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb").rename(image="jpg;png;webp")
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(7)]
    assert samples[3]["image"].size == (60, 64) and samples[3]["txt"] == "caption 3"
    assert samples[1]["json"] == {"captions": ["one", "two"]}


def test_long_images_are_scaled_to_the_short_side_and_small_ones_keep_their_bytes(table, tmp_path):
    options = PackOptions(short_side=48, quality=90)
    report = write_shards(open_source(str(table)), tmp_path / "out", options, workers=1)
    members = all_members(tmp_path / "out")
    assert report["resized"] == 2  # 56 x 60 and 64 x 60; the first two are 40 and 48 high
    for number in (0, 1):
        assert members[f"{number:09d}.jpg"] == (table.parent / f"{number}.jpg").read_bytes()
    for number, size in ((2, (51, 48)), (3, (48, 51))):
        with Image.open(io.BytesIO(members[f"{number:09d}.jpg"])) as found:
            assert found.size == size and found.format == "JPEG"
            pixels = np.asarray(found.convert("RGB"), np.float32)
            with Image.open(table.parent / f"{number}.jpg") as original:
                expected = np.asarray(original.resize(size, Image.Resampling.BICUBIC), np.float32)
        assert np.abs(pixels - expected).mean() < 3
    assert "000000006.png" in members  # a small GIF


def test_a_transparent_picture_that_is_resized_lies_on_white(tmp_path):
    data = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(data, "PNG")
    write_tar(tmp_path / "in.tar", [("a.png", data.getvalue()), ("a.txt", b"nothing")])
    write_shards(open_source(str(tmp_path / "in.tar")), tmp_path / "out", PackOptions(short_side=32), workers=1)
    assert decode(all_members(tmp_path / "out")["000000000.jpg"]).min() == 255


def test_labels_and_class_names_without_the_captions_made_from_them(tmp_path):
    source = open_source("digits:test")
    report = write_shards(source, tmp_path / "out", samples_per_shard=200, workers=2)
    assert report["samples"] == len(source) == 355 and not report["rejected"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(source.class_names)
    members = all_members(tmp_path / "out")
    assert {name.split(".")[1] for name in members} == {"png", "cls"}
    again = open_source(pattern(tmp_path), prompts="digits")
    assert again.class_names == source.class_names
    for index in (0, 199, 200, 354):
        assert again.label(index) == source.label(index)
        assert (decode(again[index].image) == decode(source[index].image)).all()
        assert again.captions(index) == source.captions(index)


def pattern(tmp_path):
    return str(tmp_path / "out" / "*.tar")


def test_class_folders_that_are_called_by_numbers_are_not_mixed_up(tmp_path):
    for name in ("10", "2", "1"):  # sorted 1, 10, 2: class 1 is called '10', and '1' is the name of class 0
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jpg").write_bytes(encoded("JPEG", 20, 20))
    source = open_source(str(tmp_path / "in"))
    write_shards(source, tmp_path / "out", workers=1)
    again = open_source(pattern(tmp_path))
    for index in range(3):
        assert again.class_names[again.label(index)] == source.class_names[source.label(index)]


def test_weights_of_captions_are_kept(tmp_path):
    fields = {"captions": ["one", "two", "never"], "weights": [1, 3, 0]}
    write_tar(tmp_path / "in.tar", [("a.jpg", encoded("JPEG", 9, 9)), ("a.json", json.dumps(fields).encode())])
    write_shards(open_source(str(tmp_path / "in.tar")), tmp_path / "out", workers=1)
    record = open_source(pattern(tmp_path))[0]
    assert record.captions == ("one", "two") and record.caption_weights == (1, 3)


def test_output_of_img2dataset_is_a_source(tmp_path):
    members = []
    for number in range(3):
        fields = {"caption": f"c{number}", "url": "http://x", "key": f"{number:09d}", "status": "success"}
        members += [
            (f"{number:09d}.jpg", encoded("JPEG", 20, 20, number)),
            (f"{number:09d}.json", json.dumps(fields).encode()),
            (f"{number:09d}.txt", f"c{number}".encode()),
        ]
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "00000.tar", members)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    report = write_shards(open_source(str(folder / "{00000..00000}.tar")), tmp_path / "out", workers=1)
    assert report["samples"] == 3 and all_members(tmp_path / "out")["000000002.txt"] == b"c2"


def test_bytes_do_not_depend_on_workers_nor_time(table, tmp_path):
    for name, workers in (("a", 1), ("b", 3)):
        write_shards(open_source(str(table)), tmp_path / name, samples_per_shard=2, workers=workers)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") and len(digests(tmp_path / "a")) == 4


def test_a_second_call_writes_only_what_is_missing(table, tmp_path):
    out = tmp_path / "out"
    first = write_shards(open_source(str(table)), out, samples_per_shard=2, workers=1)
    before, times = digests(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00001.tar").unlink()
    with (out / "00002.tar").open("ab") as file:  # not what was written
        file.write(b"more")
    second = write_shards(open_source(str(table)), out, samples_per_shard=2, workers=1)
    assert second == first and digests(out) == before
    written = [name for name, time_ns in times.items() if (out / name).stat().st_mtime_ns != time_ns]
    assert sorted(written) == ["00001.tar", "00002.tar"]


def test_a_shard_without_samples_leaves_no_file(tmp_path):
    members = []
    for number in range(6):
        image = b"broken" if number in (2, 3) else encoded("JPEG", 9, 9)
        members += [(f"{number}.jpg", image), (f"{number}.txt", b"text")]
    write_tar(tmp_path / "in.tar", members)
    report = write_shards(open_source(str(tmp_path / "in.tar")), tmp_path / "out", samples_per_shard=2, workers=1)
    assert list(report["shards"]) == ["00000.tar", "00002.tar"] and report["samples"] == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples_per_shard": 3}, "samples per shard 2, now it is 3"),
        ({"options": PackOptions(short_side=64)}, "short side None, now it is 64"),
        ({"asked": {"caption_column": "alt"}}, "caption column None, now it is alt"),
    ],
)
def test_changed_options_are_refused(table, tmp_path, change, match):
    write_shards(open_source(str(table)), tmp_path / "out", samples_per_shard=2, workers=1)
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match=match):
        write_shards(open_source(str(table)), tmp_path / "out", **{"samples_per_shard": 2, "workers": 1, **change})
    assert digests(tmp_path / "out") == before


def test_a_changed_source_is_refused(table, tmp_path):
    write_shards(open_source(str(table)), tmp_path / "out", workers=1)
    table.write_text(table.read_text().replace("caption 0", "caption x"))
    with pytest.raises(UserError, match="begun with fingerprint of the source"):
        write_shards(open_source(str(table)), tmp_path / "out", workers=1)


def test_a_folder_of_something_else_is_refused(table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="files that are not of such a run"):
        write_shards(open_source(str(table)), tmp_path / "out", workers=1)
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        write_shards(open_source(str(table)), tmp_path / "out" / "mine.txt", workers=1)


def test_a_folder_from_before_its_plan_was_written_is_taken_up(table, tmp_path):
    (tmp_path / "out" / ".progress").mkdir(parents=True)
    (tmp_path / "out" / ".lock").touch()
    assert write_shards(open_source(str(table)), tmp_path / "out", workers=1)["samples"]


def test_nothing_usable_is_an_error_with_a_report(tmp_path):
    write_tar(tmp_path / "in.tar", [("a.jpg", b"x"), ("a.txt", b"text")])
    with pytest.raises(UserError, match="none of its 1 samples can be used"):
        write_shards(open_source(str(tmp_path / "in.tar")), tmp_path / "out", workers=1)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rejected"]["unreadable_image"]["count"] == 1


def test_real_shards_keep_every_byte_that_matters(shared_data, tmp_path):
    source = open_source(str(shared_data / "flickr8k" / "dev-000000.tar"))
    report = write_shards(source, tmp_path / "out", samples_per_shard=400)
    again = open_source(pattern(tmp_path))
    assert report["samples"] == len(again) == 1000 and len(report["shards"]) == 3
    for index in range(0, 1000, 7):
        assert again[index].image == source[index].image and again.captions(index) == source.captions(index)


# The script

SHARD = [sys.executable, str(ROOT / "scripts" / "shard.py")]


def test_script_goes_on_after_it_was_interrupted(tmp_path):
    command = [*SHARD, "scenes:val", str(tmp_path / "out"), "--samples-per-shard", "100", "--workers", "2"]
    # A shell's background jobs, which a test run may be one of, ignore Ctrl-C, and so would what they start.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, **heed) as running:
        deadline = time.monotonic() + 60
        while not (len(list(tmp_path.glob("out/*.tar"))) > 3 and list(tmp_path.glob("out/.*.tmp"))):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        error = running.communicate(timeout=20)[1]
    assert running.returncode == 130 and "Traceback" not in error
    there = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.tar")}
    assert 0 < len(there) < 20 and not Path(tmp_path, "out", "report.json").exists()
    # Mostly one in progress is left aside too, but the signal may meet both workers between two shards.
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("out/.*.tmp"))
    # Each worker may have been stopped between a shard and the note that it is whole: such are made again.
    known = int(re.search(r"2,000 samples, .*\((\d+) of them were there\)", done.stderr)[1])
    kept = sum((tmp_path / "out" / name).stat().st_mtime_ns == time_ns for name, time_ns in there.items())
    assert kept == known >= len(there) - 2
    assert len(open_source(pattern(tmp_path))) == 2000


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["digits"], "OUTPUT_FOLDER"),
        (["digits", "out", "--quality", "0"], "quality 0 is not in 1..100"),
        (["digits", "out", "--short-side", "0"], "short_side 0 is not a number of pixels"),
        (["digits", "out", "--short-side", "wide"], "--short_side"),
        (["digits", "out", "--workers", "0"], "workers have to be 1 or more"),
        (["digits", "out", "--samples_per_shrad", "3"], "Did you mean 'samples_per_shard'"),
        (["digitz", "out"], "Did you mean 'digits'"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_made(tmp_path, monkeypatch, args, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as caught:
        main(args)
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_script_ends_a_mistake_with_status_2(tmp_path):
    done = subprocess.run([*SHARD, "digitz", "out"], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("shard.py: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
