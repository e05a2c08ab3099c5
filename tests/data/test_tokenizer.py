import json
import multiprocessing
import pickle
import random

import pytest
import torch

from contrastive.data.captions import caption_fault, caption_id, clean_text
from contrastive.data.tokenizer import BYTES, clip_tokenizer, load_tokenizer, train_bpe
from contrastive.errors import UserError

CAPTIONS = [
    f"{article} {size} {colour} {shape} {place}"
    for article in ("a", "The", "one")
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for place in ("on the left.", "near a triangle", "in the middle!")
]

SENTENCES = [
    "a photo of a cat",
    "  A  Photo\tof\n a CAT.  ",
    "Two dogs -- one black, one white -- are playing; it's the dogs' park & they'll stay!",
    "I'm sure you've seen we're 12,345.67 km from 'home' @ 10:30pm (approx.)",
    "caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u00c5ngstr\u00f6m \u0130stanbul \u00d8RSTED",
    "cafe\u0301 decomposed",
    "\u732b\u304c\u597d\u304d\u3002 \u041f\u0440\u0438\u0432\u0435\u0442! \u0645\u0631\u062d\u0628\u0627",
    "emoji \U0001f431\U0001f44d\U0001f3fd and \u2764\ufe0f",
    "&lt;b&gt;Tom &amp; Jerry&lt;/b&gt; &amp;amp; friends &quot;live&quot; &copy; 2021 &#39;ok&#39;",
    "\u201ccurly quotes\u201d and \u2018these\u2019 \u2026 \u2013 \u2014",
    "schÃ¶n mojibake â€“ mended by ftfy",
    "100% of $5.99 + \u00a33 = \u20ac10 \u00bd x\u00b2 \u2167 \u0663",
    "http://www.example.com/a_b?c=d#e user@mail.com C++ #hashtag snake_case",
    "don't can't won't I'd it'S DON'T",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\x1fseparator \ufb01ligature",
    "supercalifragilisticexpialidocious antidisestablishmentarianism xqzjwk",
    "",
    "!",
    "...!!!???",
    "word " * 200,
    "a <start_of_text> b <end_of_text> c",
    "\x1b[31mred\x1b[0m\x00 bell\x07",
]


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def trained():
    return train_bpe(CAPTIONS, vocab_size=320, context_length=16)


@pytest.mark.parametrize("text", SENTENCES)
def test_clip_ids_are_open_clips(clip, open_clip_tokenizer, text):
    assert torch.equal(clip(text), open_clip_tokenizer([text]))


def test_clip_ids_are_open_clips_on_random_text(clip, open_clip_tokenizer):
    draw = random.Random(0)
    alphabets = [
        "abcdefgh '&;.,!0123456789",
        "aB \u00e9\u00fc\u00df\u0416\u732b\U0001f431\u2019-_#@",
        "\u00c3\u00a4\u00e2\u20ac\u2122 x<>/\t\n",
    ]
    texts = ["".join(draw.choices(draw.choice(alphabets), k=draw.randrange(90))) for _ in range(1500)]
    ours, theirs = clip(texts), open_clip_tokenizer(texts)
    differing = [text for text, a, b in zip(texts, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert not differing, differing[:3]


def test_clip_on_real_captions(clip, open_clip_tokenizer, shared_data):
    import tarfile

    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".txt")]
        texts = [shard.extractfile(member).read().decode() for member in members]
    assert len(texts) > 500 and torch.equal(clip(texts), open_clip_tokenizer(texts))


def test_clip_shape_and_special_ids(clip):
    tokens = clip(["a cat", "word " * 500])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.pad_id) == (49408, 49406, 49407, 0)
    assert tokens[0, 0] == 49406 and tokens[0, 3] == 49407 and not tokens[0, 4:].any()
    assert tokens[1, 76] == 49407 and (tokens[1] == 49407).sum() == 1
    assert torch.equal(clip_tokenizer(8)("word " * 500)[0, :7], tokens[1, :7])
    assert clip_tokenizer(8)("word " * 500)[0, 7] == 49407


def test_quick_cleaning_is_the_full_cleaning():
    from open_clip.tokenizer import get_clean_fn

    full = get_clean_fn("lower")
    for text in [*SENTENCES, *CAPTIONS, "tab\there", "&notanentity", "\x7f del", " \r\n"]:
        assert clean_text(text, "clip") == full(text), text


def test_trained_layout(trained):
    tokens = trained(["a small red circle", ""])
    # transformers' CLIPModel takes an eos of 2 for "the highest id of the text"
    assert (trained.pad_id, trained.eos_id, trained.bos_id) == (0, 1, 2)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert tokens[1].tolist() == [2, 1] + [0] * 14
    end = tokens[0].tolist().index(1)
    assert tokens[0, 0] == 2 and (tokens[0, 1:end] > 2).all() and not tokens[0, end + 1 :].any()
    assert end == 5, "the words of the captions are not whole tokens"
    assert BYTES + 3 < trained.vocab_size <= 320 and trained(CAPTIONS).max() < trained.vocab_size


def test_trained_truncation_keeps_eos(trained):
    tokens = trained("red green blue " * 30)
    assert tokens[0, -1] == trained.eos_id and (tokens[0] == trained.eos_id).sum() == 1


def test_trained_lower_cases_and_composes(trained):
    assert torch.equal(trained("A  SMALL\nRed circle "), trained("a small red circle"))
    assert torch.equal(trained("cafe\u0301"), trained("caf\u00e9"))
    assert not torch.equal(trained("red"), trained("green"))


@pytest.mark.parametrize("text", ["the large blue square near a triangle", "caf\u00e9 \u732b \U0001f431 x9!"])
def test_trained_round_trip_of_any_text(text):
    tokenizer = train_bpe(CAPTIONS, vocab_size=320, context_length=64)
    assert tokenizer.decode(tokenizer(text)[0]) == text


def test_clip_decode(clip):
    assert clip.decode(clip("A photo of two cats, 3 dogs!")[0]) == "a photo of two cats , 3 dogs !"
    assert clip.decode(clip("m\u00fcsli \u732b")[0]) == "m\u00fcsli \u732b"


def test_special_tokens_in_a_caption_are_plain_text(trained):
    tokens = trained("a <eos> red <pad> <bos>")[0].tolist()
    assert tokens.count(2) == 1 and tokens.count(1) == 1


def test_training_is_deterministic_and_blind_to_order(trained, tmp_path):
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    for name, captions in (("first", CAPTIONS), ("shuffled", shuffled)):
        train_bpe(iter(captions), vocab_size=320, context_length=16).save(tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "shuffled"))
    assert first == second
    assert not torch.equal(train_bpe(CAPTIONS[:20], 300, 16)(CAPTIONS), trained(CAPTIONS)), "captions do not matter"


def test_training_skips_what_is_no_caption(trained):
    dirty = ["", "  ", "\udcff broken", "x" * 3_000_000, *CAPTIONS]
    assert torch.equal(train_bpe(dirty, 320, 16)(CAPTIONS), trained(CAPTIONS))


@pytest.mark.parametrize(
    ("captions", "options", "words"),
    [
        ([], {}, "no captions"),
        (["", " "], {}, "no captions"),
        (CAPTIONS, {"vocab_size": BYTES}, "259"),
        (CAPTIONS, {"context_length": 2}, "context length"),
    ],
)
def test_training_on_bad_input(captions, options, words):
    with pytest.raises(UserError, match=words):
        train_bpe(captions, **options)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory, trained):
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    return save_transformers(tmp_path_factory.mktemp("transformers"), trained, **special)


def save_transformers(folder, trained, **options):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = pickle.loads(pickle.dumps(trained.core))
    core.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", truncation_side="left", model_max_length=5, **options
    ).save_pretrained(folder)
    return folder


def test_transformers_folder_pads_right_and_keeps_eos(transformers_folder, trained):
    tokenizer = load_tokenizer(transformers_folder, context_length=16)
    texts = [*CAPTIONS, "", "red green blue " * 30]
    assert torch.equal(tokenizer(texts), trained(texts))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, trained.vocab_size)
    assert tokenizer.decode(tokenizer("a red circle")[0]) == "a red circle"
    assert tokenizer([]).shape == (0, 16)


def test_eos_is_added_where_a_transformers_tokenizer_does_not(tmp_path, trained):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=trained.core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tmp_path
    )
    tokens = load_tokenizer(tmp_path, context_length=8)(["a red", "red green blue " * 9])
    assert tokens[0].tolist().index(1) == 2 and tokens[1].tolist().index(1) == 7


@pytest.mark.parametrize(("missing", "given"), [("pad", {"eos_token": "<eos>"}), ("eos", {"pad_token": "<pad>"})])
def test_transformers_folder_without_a_special_token(tmp_path, trained, missing, given):
    save_transformers(tmp_path, trained, **given)
    with pytest.raises(UserError, match=f"no {missing} token.*{missing}_token"):
        load_tokenizer(tmp_path, context_length=16)


@pytest.mark.parametrize("kind", ["trained", "clip", "transformers"])
def test_save_load_and_pickle(kind, trained, clip, transformers_folder, tmp_path):
    tokenizer = {"trained": trained, "clip": clip}.get(kind) or load_tokenizer(transformers_folder, 16)
    tokenizer.save(tmp_path / "deep" / "folder")
    loaded = load_tokenizer(tmp_path / "deep" / "folder")
    again = pickle.loads(pickle.dumps(tokenizer))
    texts = [*CAPTIONS, *SENTENCES, "a <eos> b"]
    for other in (loaded, again):
        assert torch.equal(other(texts), tokenizer(texts))
        for name in ("kind", "vocab_size", "context_length", "pad_id", "eos_id", "bos_id"):
            assert getattr(other, name) == getattr(tokenizer, name)
    assert load_tokenizer(tmp_path / "deep" / "folder", context_length=9)(texts).shape[1] == 9


def test_vocabularies_of_older_runs_keep_their_ids(trained, tmp_path):
    """Before eos was id 1 it was id 2, and bos 1: names decide, not places."""
    trained.save(tmp_path)
    model, options = tmp_path / "tokenizer.json", tmp_path / "contrastive_tokenizer.json"
    description = json.loads(model.read_text())
    vocabulary = description["model"]["vocab"]
    vocabulary["<bos>"], vocabulary["<eos>"] = 1, 2
    model.write_text(json.dumps(description))
    options.write_text(json.dumps(json.loads(options.read_text()) | {"bos_id": 1, "eos_id": 2}))
    tokens, new = load_tokenizer(tmp_path)(CAPTIONS), trained(CAPTIONS)
    swapped = torch.tensor([0, 2, 1])
    assert torch.equal(tokens, torch.where(new < 3, swapped[new.clamp(max=2)], new))
    assert tokens[0, 0] == 1 and (tokens == 2).sum(1).eq(1).all()


def test_a_tokenizer_of_the_library_as_the_library_uses_it(tmp_path, trained):
    """add_eos false: the ids that a model of the library was trained on, whether eos ends them or not."""
    from transformers import PreTrainedTokenizerFast

    from contrastive.data.tokenizer import TransformersTokenizer

    theirs = PreTrainedTokenizerFast(tokenizer_object=trained.core, pad_token="<pad>", eos_token="<eos>")
    theirs.save_pretrained(tmp_path)
    tokenizer = TransformersTokenizer(tmp_path, 8, add_eos=False)
    texts = [*CAPTIONS, "", "red green blue " * 9]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer(texts), expected)
    tokenizer.save(tmp_path / "saved")
    assert torch.equal(load_tokenizer(tmp_path / "saved")(texts), expected)


def test_special_ids_that_do_not_match_are_named(trained, tmp_path):
    trained.save(tmp_path)
    options = tmp_path / "contrastive_tokenizer.json"
    options.write_text(options.read_text().replace('"eos_id": 1', '"eos_id": 7'))
    with pytest.raises(UserError, match="eos_id 1 .* 7"):
        load_tokenizer(tmp_path)


def test_bad_names(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'clip'"):
        load_tokenizer("clipp")
    with pytest.raises(UserError, match="context length"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot read a tokenizer") as error:
        load_tokenizer(tmp_path, context_length=8)
    assert "\n" not in str(error.value)


def _tokens_in_child(tokenizer, queue):
    queue.put(tokenizer(CAPTIONS).tolist())


def test_forked_process_gives_the_same_ids(trained, capfd):
    expected = trained(CAPTIONS).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_tokens_in_child, args=(trained, queue))
    child.start()
    assert queue.get(timeout=20) == expected
    child.join(20)
    assert "parallelism" not in capfd.readouterr().err


def test_caption_ids_and_faults():
    assert caption_id("a cat") == caption_id("a " + "cat") != caption_id("a cat.")
    assert caption_id("a cat") == -6711169336525982361, "ids must not change between machines and versions"
    assert len({caption_id(text) for text in CAPTIONS}) == len(CAPTIONS)
    assert torch.tensor([caption_id(text) for text in CAPTIONS]).dtype == torch.int64
    faults = [caption_fault(text) for text in ("a cat", "", " \n", "x" * 2_000_000, "a\udc80", "caf\u00e9")]
    assert faults == [None, "empty_caption", "empty_caption", "caption_too_long", "bad_utf8", None]
