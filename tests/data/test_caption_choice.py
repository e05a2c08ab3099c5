"""Which caption is drawn, which a tokenizer is trained on, how they are cleaned: alike in training and in use."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.augment import AugmentConfig
from contrastive.data.captions import caption_id, clean_text, drawn_order, sampled_captions
from contrastive.data.order import Order
from contrastive.data.record import BadSample, Record, Source
from contrastive.data.samples import PairDataset
from contrastive.data.settings import DataConfig
from contrastive.data.sources import open_source
from contrastive.data.sources.derived import ClassPrompts
from contrastive.data.tokenizer import clip_tokenizer, load_tokenizer, train_bpe
from contrastive.errors import UserError

TEXTS = [
    "A photo of a dog.",
    "  Two\tdogs,\n running!  ",
    "snake_case & rock 'n' roll",
    "Tom &amp;amp; Jerry &lt;b&gt;",
    "caf\u00c3\u00a9 na\u00efve",
    "\u201cquoted\u201d \u2014 dashes\u2026",
    "100% (off) #1 @home",
    "\u0130stanbul \ufb01sh",
    "!!!",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_cleaning_is_open_clips(text):
    from open_clip.tokenizer import get_clean_fn

    assert clean_text(text, "whitespace") == get_clean_fn("whitespace")(text)
    assert clean_text(text, "clip") == get_clean_fn("lower")(text)
    assert clean_text(text, "canonicalize") == get_clean_fn("canonicalize")(text)
    assert clean_text(text, "none") == text


def test_canonicalize_in_plain_words():
    assert clean_text("A photo_of a  DOG's tail.", "canonicalize") == "a photo of a dogs tail"


def record(captions, weights=None):
    return Record("key", b"", tuple(captions), caption_weights=weights)


def shares(weights, count=4000):
    draws = (np.arange(count) + 0.5) / count
    first = [drawn_order(record("abcd"[: len(weights)], tuple(weights)), draw)[0] for draw in draws]
    return [first.count(letter) / count for letter in "abcd"[: len(weights)]]


def test_captions_are_drawn_as_often_as_their_weights_say():
    assert shares([1, 3]) == [0.25, 0.75]
    assert shares([0, 2, 0, 6]) == [0, 0.25, 0, 0.75]
    assert np.allclose(shares([0.1, 0.2, 0.7]), [0.1, 0.2, 0.7], atol=1e-3)
    assert drawn_order(record("ab", (1e-300, 0.0)), 1 - 2**-53) == ("a",)


def test_equal_weights_draw_what_no_weights_draw():
    for draw in np.random.default_rng(0).random(200):
        assert drawn_order(record("abc", (2.0, 2.0, 2.0)), draw) == drawn_order(record("abc"), draw)
    assert drawn_order(record("abc"), 0.5) == ("b", "c", "a")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0), (0.0, 0.0), ()])
def test_bad_weights(weights):
    with pytest.raises(BadSample, match="bad_weights"):
        drawn_order(record("ab", weights), 0.5)


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(file, "JPEG")
    return file.getvalue()


class Memory(Source):
    name, fingerprint = "memory", "0"

    def __init__(self, captions, weights=None):
        self.words, self.caption_weights = tuple(captions), weights

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return Record(f"key{index}", jpeg(), self.words, None, self.caption_weights)


def texts(source, tokenizer, templates=("{}",), *options):
    dataset = PairDataset(source, Order(64, 8, 0), tokenizer, 16, AugmentConfig(), templates, *options)
    return [dataset[position] for position in range(64)]


def test_cleaning_comes_before_identity_and_tokens():
    words = train_bpe(["a dogs tail"] * 2, 300, 32, "canonicalize")
    samples = texts(Memory(["A dog's_tail.", "a dog's tail!", "??"]), words)
    assert {sample["caption_id"] for sample in samples} == {caption_id("a dogs tail")}
    assert {words.decode(sample["tokens"]) for sample in samples} == {"a dogs tail"}
    assert {reason for sample in samples for reason, _ in sample["bad"]} == {"empty_caption"}
    assert torch.equal(words("A DOG'S tail"), words.tokenize_clean(["a dogs tail"]))


def test_weights_reach_the_samples():
    words = train_bpe(["rare often"] * 2, 300, 32)
    seen = [words.decode(sample["tokens"]) for sample in texts(Memory(["rare", "often"], (1.0, 7.0)), words)]
    assert 2 <= seen.count("rare") <= 16 and len(seen) == 64


def test_several_captions_of_an_image_at_once():
    """Different ones while there are any; the first is the one drawn alone, and unusable ones are passed over."""
    words = train_bpe(["one two three"] * 2, 300, 32)
    source = Memory(["one", "two", "three", ""])
    for alone, sample in zip(texts(source, words), texts(source, words, ("{}",), 3), strict=True):
        assert torch.equal(sample["tokens"][0], alone["tokens"]) and torch.equal(sample["image"], alone["image"])
        read = [words.decode(row) for row in sample["tokens"]]
        assert set(read) == {"one", "two", "three"}
        assert sample["caption_id"].tolist() == [caption_id(text) for text in read]
    again = texts(Memory(["one", "two"]), words, ("{}", "{} three"), 4)
    firsts = [[words.decode(row).split()[0] for row in sample["tokens"]] for sample in again]
    assert all(sorted(four) == ["one", "one", "two", "two"] for four in firsts)
    assert len({tuple(map(words.decode, sample["tokens"])) for sample in again}) > 2  # a template for each


def spread(source, words, count):
    samples = texts(source, words, ("{}",), count, 0.0, (), True)
    return [[words.decode(row) for row in sample["tokens"]] for sample in samples], samples


def test_captions_spread_over_columns():
    """One of each of two columns that weigh alike, whatever they hold; of weights 1 and 3, one and three."""
    words = train_bpe(["s1 s2 s3 l1 l2 l3"] * 2, 300, 32)
    both, _ = spread(Memory(["s1", "s2", "s3", "l1"], (1 / 3, 1 / 3, 1 / 3, 1.0)), words, 2)
    assert {tuple(pair) for pair in both} == {(short, "l1") for short in ("s1", "s2", "s3")}
    both, _ = spread(Memory(["s1", "s2", "l1", "l2"], (0.5, 0.5, 0.5, 0.5)), words, 2)
    assert len({tuple(pair) for pair in both}) == 4, "drawn apart"
    four, _ = spread(Memory(["s1", "s2", "l1", "l2", "l3"], (0.5, 0.5, 1.0, 1.0, 1.0)), words, 4)
    assert {tuple(sorted(each)) for each in four} == {("l1", "l2", "l3", short) for short in ("s1", "s2")}
    first, again = (spread(Memory(["s1", "l1", "l2"], (1.0, 0.5, 0.5)), words, 2)[0] for _ in range(2))
    assert first == again
    # What cannot be used, and a column that a sample lacks, leave their place to another caption.
    both, samples = spread(Memory(["s1", "", "l1"], (0.5, 0.5, 1.0)), words, 2)
    assert all(set(pair) == {"s1", "l1"} for pair in both)
    assert {len(sample["bad"]) for sample in samples} == {0, 1}
    assert all(set(pair) == {"s1", "s2"} for pair in spread(Memory(["s1", "s2"], (0.5, 0.5)), words, 2)[0])
    assert all(pair == ["s1", "s1"] for pair in spread(Memory(["s1"], (1.0,)), words, 2)[0])


@pytest.mark.parametrize("tokenizer", ["bpe", "clip"])
def test_some_tokens_left_out(tokenizer):
    """In their order, with the end after them and padding after that; drawn anew for each sample, and image."""
    words = "one two three four five six seven eight"
    tokenizer = train_bpe([words] * 2, 400, 16) if tokenizer == "bpe" else load_tokenizer("clip", 16)
    source = Memory([words])
    whole, thinned = (texts(source, tokenizer, ("{}",), 1, share) for share in (0.0, 0.25))
    kept = []
    for before, after in zip(whole, thinned, strict=True):
        assert after["caption_id"] == before["caption_id"] and after["tokens"].shape == before["tokens"].shape
        length = after["tokens"].tolist().index(tokenizer.eos_id)
        assert after["tokens"][0] == before["tokens"][0] and (after["tokens"][length + 1 :] == tokenizer.pad_id).all()
        left = iter(before["tokens"].tolist())
        assert all(token in left for token in after["tokens"][: length + 1].tolist())  # as a subsequence
        kept.append(length - 1)
    most = whole[0]["tokens"].tolist().index(tokenizer.eos_id) - 1
    assert 0.65 * most < sum(kept) / 64 < 0.85 * most and len({tuple(s["tokens"].tolist()) for s in thinned}) > 32
    again = texts(source, tokenizer, ("{}",), 1, 0.25)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(thinned, again, strict=True))


@pytest.mark.parametrize("clean", ["none", "canonicalize"])
def test_templates(clean):
    words = train_bpe(["a photo of the dog"] * 2, 300, 32, clean)
    samples = texts(Memory(["the {dog}"]), words, ("{}", "a photo of {}."))
    expected = {"none": {"the {dog}", "a photo of the {dog}."}, "canonicalize": {"the dog", "a photo of the dog"}}[
        clean
    ]
    assert {words.decode(sample["tokens"]) for sample in samples} == expected
    assert {sample["caption_id"] for sample in samples} == {caption_id(text) for text in expected}


def test_a_single_template_leaves_the_draws_of_the_image_alone():
    words, source = train_bpe(["dog"] * 2, 300, 32), Memory(["dog"])
    plain, filled = (texts(source, words, templates) for templates in (("{}",), ("a {}",)))
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(plain, filled, strict=True))


@pytest.mark.parametrize(("templates", "message"), [(("a photo",), "'a photo' has no '{}'"), ((), "is empty")])
def test_bad_templates(templates, message):
    with pytest.raises(UserError, match=message):
        DataConfig(caption_templates=templates)


def test_vocabulary_is_learnt_from_clean_captions(tmp_path):
    for name, caption in (("stored", "dog_house, dog-HOUSE!"), ("clean", "dog house doghouse")):
        train_bpe([caption] * 3 + ["!"], 300, 32, "canonicalize").save(tmp_path / name)
    assert (tmp_path / "stored/tokenizer.json").read_text() == (tmp_path / "clean/tokenizer.json").read_text()


def test_tokenizer_keeps_its_cleaning(tmp_path):
    words = train_bpe(["a dog"] * 2, 300, 32, "canonicalize")
    words.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.clean == "canonicalize" and torch.equal(again("A, dog!"), words("a dog"))
    assert load_tokenizer(tmp_path, clean="none").clean == "none"
    options = json.loads((tmp_path / "contrastive_tokenizer.json").read_text())
    del options["clean"]  # as saved before there was cleaning
    (tmp_path / "contrastive_tokenizer.json").write_text(json.dumps(options))
    assert load_tokenizer(tmp_path).clean == "none"
    assert torch.equal(load_tokenizer("clip", clean="canonicalize")("A, dog!"), clip_tokenizer()("a dog"))


def write_table(folder, kind):
    rows = [("one", "two"), ("three", None), (None, None), ("", "four")]
    for number in range(len(rows)):
        (folder / f"{number}.jpg").write_bytes(jpeg())
    if kind == "csv":
        text = "".join(f"{n}.jpg,{alt or ''},{synthetic or ''}\n" for n, (alt, synthetic) in enumerate(rows))
        (folder / "pairs.csv").write_text("image,alt,synthetic\n" + text)
    else:
        lines = [json.dumps({"image": f"{n}.jpg", "alt": a, "synthetic": s}) for n, (a, s) in enumerate(rows)]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
    return str(folder / f"pairs.{kind}")


def test_several_caption_columns(tmp_path):
    path = write_table(tmp_path, "jsonl")
    source = open_source(path, caption_column="alt=1, synthetic=3")
    assert source[0].captions == source.captions(0) == ("one", "two") and source[0].caption_weights == (1.0, 3.0)
    assert source[1].captions == ("three",) and source[1].caption_weights == (1.0,)
    assert source[2].captions == () == source.captions(2)
    other = open_source(path, caption_column="alt,synthetic")
    assert other[0].caption_weights == (1.0, 1.0) and other.fingerprint != source.fingerprint
    alone = open_source(path, caption_column="synthetic")
    assert alone[0].captions == ("two",) and alone[0].caption_weights is None
    assert open_source(write_table(tmp_path, "csv"), caption_column="alt,synthetic=2")[0].caption_weights == (1.0, 2.0)


def test_a_list_in_one_column_shares_its_weight(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(jpeg())
    row = {"image": "picture.jpg", "human": ["a", "b", "c", "d"], "machine": "e"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    sample = open_source(str(tmp_path / "pairs.jsonl"), caption_column="human=2,machine=1")[0]
    assert sample.captions == ("a", "b", "c", "d", "e") and sample.caption_weights == (0.5, 0.5, 0.5, 0.5, 1.0)


def test_a_column_name_with_commas_is_taken_as_it_is(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "x.jpg", "a=1,b": "odd"}))
    assert open_source(str(tmp_path / "pairs.jsonl"), caption_column="a=1,b").captions(0) == ("odd",)


def test_caption_columns_of_a_saved_dataset(tmp_path):
    import datasets

    rows = {"image": [{"bytes": jpeg(), "path": None}], "alt": ["one"], "synthetic": [["two", "three"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    sample = open_source(str(tmp_path / "saved"), caption_column="alt=1,synthetic=3")[0]
    assert sample.captions == ("one", "two", "three") and sample.caption_weights == (1.0, 1.5, 1.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("alt=1,syntetic=3", "no column 'syntetic'.*Did you mean 'synthetic'"),
        ("alt=many,synthetic", "weight of 'alt' is 'many'"),
        ("alt=0,synthetic", "weight of 'alt' is '0'"),
        ("alt=-1,synthetic", "weight of 'alt' is '-1'"),
        ("alt,alt", "names a column twice"),
        ("alt,", "names a column twice, or not at all"),
    ],
)
def test_bad_caption_columns(tmp_path, asked, message):
    with pytest.raises(UserError, match=message) as error:
        open_source(write_table(tmp_path, "jsonl"), caption_column=asked)
    assert "\n" not in str(error.value)


def test_prompts_take_the_place_of_captions_and_their_weights():
    class Labelled(Memory):
        class_names = ("cat", "dog")

        def __getitem__(self, index):
            return Record("key", b"", self.words, 1, self.caption_weights)

    sample = ClassPrompts(Labelled(["a", "b", "c"], (1.0, 2.0, 3.0)), ("a {}", "one {}"))[0]
    assert drawn_order(sample, 0.9) == ("one dog", "a dog")


class Counting(Source):
    def __init__(self, count, remote):
        self.count, self.remote = count, remote

    def __len__(self):
        return self.count

    def captions(self, index):
        if index == 3:
            raise BadSample("bad_json")
        return (index, -index - 1)


@pytest.mark.parametrize("remote", [False, True])
def test_all_of_a_small_source(remote):
    wanted = [c for index in range(30_000) if index != 3 for c in (index, -index - 1)]
    assert list(sampled_captions(Counting(30_000, remote))) == wanted


def test_evenly_spread_when_local_and_in_runs_when_far():
    """400 million samples in shards of 10,000: a sample here and there, or 16 shards at most."""
    local, far = ([c for c in sampled_captions(Counting(400_000_000, remote)) if c >= 0] for remote in (False, True))
    assert (len(local), len(far)) == (50_000, 49_999)  # sample 3 is bad, and in the runs only
    assert {b - a for a, b in zip(local, local[1:], strict=False)} == {8000}
    assert len({index // 10_000 for index in far}) <= 16
    assert max(far) > 340_000_000
