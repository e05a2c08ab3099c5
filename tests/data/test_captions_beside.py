"""Captions that lie beside an image under its key, in shards: lines of a text, several texts, keys with dots."""

import json

import pytest
from pictures import encode
from PIL import Image
from shard_writing import refusal, write_tar

from contrastive.commands.index_command import main as index_main
from contrastive.data.shards.shard_writing import write_shards
from contrastive.data.shards.tar_members import group_members
from contrastive.data.sources import announce, open_source
from contrastive.data.sources.beside import caption_lines
from contrastive.errors import UserError

JPEG = encode(Image.new("RGB", (8, 8)), "JPEG")


def shard(tmp_path, *members, name="x.tar"):
    return write_tar(tmp_path / name, [(member, data.encode()) for member, data in members])


# A caption a line


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("one", ("one",)),
        (" one \r\n", (" one ",)),
        ("one\ntwo\n", ("one", "two")),
        ("one\r\ntwo", ("one", "two")),
        ("one\rtwo\r", ("one", "two")),
        ("\n\none\n \n", ("one",)),
        ("one\u2028still one\x0bstill", ("one\u2028still one\x0bstill",)),
        ("", ("",)),
        (" \n ", (" \n ",)),
    ],
)
def test_lines_of_a_text(text, captions):
    assert caption_lines(text) == captions


def test_a_text_of_a_shard_is_a_caption_a_line(tmp_path):
    path = shard(tmp_path, ("a.jpg", "A"), ("a.txt", "\ufeffone\r\n\r\ntwo\r\n"), ("b.jpg", "B"), ("b.txt", "three"))
    source = open_source(path)
    assert source.captions(0) == source[0].captions == ("one", "two") and source.captions(1) == ("three",)
    assert source.reading == "captions: KEY.txt, one a line"


def test_a_fingerprint_changes_only_where_the_reading_did(tmp_path):
    """Of one line a text the fingerprint is what it always was; a resumed run does not go on with more captions."""
    lines = open_source(shard(tmp_path, ("a.jpg", "A"), ("a.txt", "one\ntwo")))
    (tmp_path / "other").mkdir()
    line = open_source(shard(tmp_path, ("a.jpg", "A"), ("a.txt", "one two"), name="other/x.tar"))
    assert line.fingerprint == "c6922707dfd62790" != lines.fingerprint
    assert line.reading == "captions: KEY.txt"


def test_a_caption_in_json_stays_one_text(tmp_path):
    path = shard(tmp_path, ("a.jpg", "A"), ("a.json", json.dumps({"caption": "one\ntwo"})))
    assert open_source(path).captions(0) == ("one\ntwo",)
    assert open_source(path).reading == "captions: KEY.json 'caption'"


@pytest.mark.parametrize("captions", [("one", "two"), ("one\ntwo",), ("one\n\ntwo", "three"), ("one",)])
def test_shards_are_read_back_as_they_were_written(tmp_path, captions):
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"image": "a.jpg", "caption": captions}))
    (tmp_path / "a.jpg").write_bytes(JPEG)
    write_shards(open_source(str(table)), tmp_path / "out", workers=1)
    assert open_source(f"{tmp_path}/out/00000.tar")[0].captions == captions


def test_lines_of_a_text_are_written_as_several(tmp_path):
    members = [("a.jpg", JPEG), ("a.txt", b"one\ntwo\n")]
    write_shards(open_source(write_tar(tmp_path / "x.tar", members)), tmp_path / "out", workers=1)
    assert open_source(f"{tmp_path}/out/00000.tar")[0].captions == ("one", "two")


# Keys with dots


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("a.jpg a.txt b.v2.jpg b.v2.txt c.v2.jpg c.v2.txt", "a b.v2 c.v2"),
        ("2023.01.a.jpg 2023.01.a.txt 2023.02.b.JPG 2023.02.b.txt", "2023.01.a 2023.02.b"),
        ("d/b.v2.jpg d/b.v2.txt d/b.V3.jpg d/b.V3.txt", "d/b.v2 d/b.V3"),
        ("b.v2.jpg b.v2.seg.png b.v2.alt.txt b.v2.txt b.v2.npy", "b.v2"),
        ("b.v2.jpg b.v3.jpg b.v2.txt b.v3.txt", "b.v2 b.v3"),
        ("a.jpg a.left.jpg a.seg.png a.txt", "a"),
        ("a.left.jpg a.right.jpg a.txt", "a"),
        ("b.v2.txt", "b.v2"),
        ("b.v2.npy", ""),
    ],
)
def test_keys_of_samples(tmp_path, names, keys):
    groups, _ = group_members(shard(tmp_path, *((name, name) for name in names.split())))
    assert [group.key.decode() for group in groups] == keys.split()
    for group in groups:
        assert all(member.name.startswith(group.key + b".") for member in group.roles if member)
    assert not any(group.refusal for group in groups)


def test_keys_with_dots_are_read(tmp_path):
    members = [(f"{key}.{end}", f"{end} of {key}") for key in ("a", "b.v2", "c.v2") for end in ("jpg", "txt")]
    source = open_source(shard(tmp_path, *members))
    assert [source[index].captions for index in range(3)] == [("txt of a",), ("txt of b.v2",), ("txt of c.v2",)]
    assert [source[index].key for index in range(3)] == ["x.tar/a", "x.tar/b.v2", "x.tar/c.v2"]
    assert source[1].image == b"jpg of b.v2" and not source.left_aside


def test_a_key_with_dots_that_comes_again_is_refused(tmp_path):
    source = open_source(
        shard(tmp_path, *((name, name) for name in ("b.v2.jpg", "c.jpg", "b.v2.txt", "d.txt", "d.jpg")))
    )
    assert [refusal(source, index) for index in (0, 2)] == ["duplicate_member"] * 2


# What is left aside


def test_members_left_aside_are_counted_by_reason(tmp_path, capsys):
    path = shard(
        tmp_path,
        *((name, "x") for name in ("a.JPG", "a.txt", "a.png", "a.seg.png", "b.avif", "b.txt", "c.jpg", "c.npy")),
        *((name, "x") for name in ("README", "._c.jpg", "__meta__/x.json")),
    )
    source = open_source(path)
    assert len(source) == 3 and source[0].image == b"x"
    assert {reason: (found["count"], found["keys"][0]) for reason, found in source.left_aside.items()} == {
        "missing_image": (1, "x.tar/b"),
        "second image": (1, "x.tar/a.png"),
        ".seg.png": (1, "x.tar/a.seg.png"),
        ".avif": (1, "x.tar/b.avif"),
        ".npy": (1, "x.tar/c.npy"),
        "hidden or without suffix": (2, "x.tar/README"),
    }
    announce(source)
    assert "left aside: 2 hidden or without suffix, as 'x.tar/README'; left aside: 1" in capsys.readouterr().err
    index_main([path])
    printed = capsys.readouterr().out
    assert "refused   1 (1 missing_image)" in printed and "1 .avif" in printed and "1 second image" in printed
    assert "read as   captions: KEY.txt\n" in printed


def test_suffixes_without_end_are_told_apart_up_to_some(tmp_path):
    path = shard(tmp_path, ("a.jpg", "A"), *((f"a.{number}x", "x") for number in range(40)), ("a.txt", "t"))
    left_aside = open_source(path).left_aside
    assert len(left_aside) == 17 and left_aside["other"]["count"] == 24


def test_a_shard_without_samples_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="holds no sample: .*; it holds 2 .avif; it holds 1 .mp4"):
        open_source(shard(tmp_path, ("a.avif", "A"), ("b.avif", "B"), ("c.mp4", "C")))


# Several texts


@pytest.fixture
def both(tmp_path):
    return shard(
        tmp_path,
        *(("a.jpg", "A"), ("a.json", '{"caption": "alt text", "dense": "long"}'), ("a.txt", "recaptioned\nagain")),
        *(("a.alt.txt", "other"), ("a.cap", "own")),
        *(("b.jpg", "B"), ("b.json", '{"caption": "same"}'), ("b.txt", "same\n")),
    )


def test_the_json_is_taken_and_it_is_said_where_a_text_differs(both):
    source = open_source(both)
    assert source.captions(0) == ("alt text",)
    note = "(KEY.txt says other in 1 samples; caption_column txt takes it)"
    assert source.reading == f"captions: KEY.json 'caption' {note}"


@pytest.mark.parametrize(
    ("asked", "captions", "weights"),
    [
        ("txt", ("recaptioned", "again"), None),
        (".txt", ("recaptioned", "again"), None),
        ("json", ("alt text",), None),
        ("dense", ("long",), None),
        ("alt.txt", ("other",), None),
        ("CAP", ("own",), None),
        ("txt=1,json=3", ("recaptioned", "again", "alt text"), (0.5, 0.5, 3.0)),
        ("dense=2,alt.txt", ("long", "other"), (2.0, 1.0)),
    ],
)
def test_any_text_can_be_named(both, asked, captions, weights):
    source = open_source(both, caption_column=asked)
    assert source[0].captions == source.captions(0) == captions and source[0].caption_weights == weights
    assert asked.lower() not in source.left_aside and "says other" not in source.reading


def test_a_sample_without_the_text_that_is_named_has_no_caption(both):
    for asked in ("dense", "alt.txt"):
        assert open_source(both, caption_column=asked).captions(1) == ()


def test_a_name_that_is_nowhere_is_refused_with_what_is_there(both):
    with pytest.raises(UserError) as caught:
        open_source(both, caption_column="alt.tx")
    assert str(caught.value).endswith(
        "no caption field 'alt.tx' in the JSON of the samples; the fields there are: caption, dense; "
        "the texts beside the images are: .alt.txt, .cap, .json, .txt. Did you mean 'alt.txt'?"
    )


def test_weights_in_the_json_stay_with_its_list(tmp_path):
    path = shard(tmp_path, ("a.jpg", "A"), ("a.json", '{"captions": ["x", "y"], "weights": [1, 3]}'), ("a.txt", "x"))
    for asked in (None, "captions", "json"):
        assert open_source(path, caption_column=asked)[0].caption_weights == (1.0, 3.0)
    assert open_source(path).reading == "captions: KEY.json 'captions'"


@pytest.mark.parametrize("value", ['"x"', '["y", "x "]', '["x", 3]'])
def test_a_text_that_says_no_more_than_the_json_is_no_difference(tmp_path, value):
    path = shard(tmp_path, ("a.jpg", "A"), ("a.json", f'{{"captions": {value}}}'), ("a.txt", "x\n"))
    assert "says other" not in open_source(path).reading


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ('["one", null, "two"]', ("one", "two")),
        ('{"raw": "one", "id": 3}', ("one",)),
        ('[{"caption": "one"}, {"caption": "two"}]', ("one", "two")),
        ("7", ()),
    ],
)
def test_captions_in_json_are_written_as_in_tables(tmp_path, value, captions):
    path = shard(tmp_path, ("a.jpg", "A"), ("a.json", f'{{"caption": {value}}}'), ("b.jpg", "B"), ("b.txt", "x"))
    assert open_source(path).captions(0) == captions


def test_a_shard_of_which_nothing_can_be_used_says_why(tmp_path):
    path = shard(tmp_path, *((name, "x") for name in ("a.jpg", "b.jpg", "a.txt", "b.txt")))
    with pytest.raises(UserError, match="x.tar: the members of no key, as 'a', follow .* `tar --sort=name`"):
        open_source(path)


def test_a_shard_without_captions_says_what_there_is(tmp_path):
    members = [("a.jpg", "x"), ("a.json", '{"TEXT": "t", "url": "u"}'), ("a.caption", "t")]
    path = shard(tmp_path, *members)
    with pytest.raises(UserError, match=r"\(KEY.json holds TEXT, url\); name .* caption_column, .* 1 .caption, as"):
        open_source(path)
    assert open_source(path, caption_column="TEXT").captions(0) == ("t",)
    assert open_source(path, caption_column="caption").captions(0) == ("t",)


def test_a_field_called_as_a_column_of_captions_is_read_where_there_is_nothing_else(tmp_path):
    path = shard(tmp_path, ("a.jpg", "x"), ("a.json", '{"url": "u", "title": "y", "text": "t"}'))
    source = open_source(path)
    assert source.captions(0) == ("t",) and source.reading == "captions: KEY.json 'text'"
    path = shard(tmp_path, ("a.jpg", "x"), ("a.json", '{"text": "t"}'), ("b.jpg", "x"), ("b.txt", "b"))
    source = open_source(path)
    assert [source.captions(0), source.captions(1)] == [(), ("b",)] and source.reading == "captions: KEY.txt"


def test_several_members_are_several_captions(tmp_path):
    path = shard(tmp_path, ("a.jpg", "x"), *((f"a.{number}.txt", f"{number}") for number in range(3)))
    source = open_source(path, caption_column="0.txt,1.txt,2.txt")
    assert source[0].captions == ("0", "1", "2") and source[0].caption_weights == (1.0, 1.0, 1.0)
