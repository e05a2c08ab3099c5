"""Tokenizers between here and transformers: ids equal on real captions, in both directions."""

import json
import tarfile

import pytest
import torch
from transformers_models import edit_json, save_theirs

import contrastive
from contrastive.data.tokenizer import TransformersTokenizer, clip_tokenizer, load_tokenizer, train_bpe
from contrastive.errors import UserError
from contrastive.interop.formats.tokenizer_files import highest_id, write_tokenizer
from contrastive.interop.formats.tokenizer_files import read_transformers_tokenizer as read_tokenizer
from contrastive.models import TextTowerConfig

ODD = [
    "",
    "a <eos> b <|endoftext|> wow! !! ! <pad> <bos>",
    "word " * 100,
    "  Tab\tand\nline  ",
    "don't under_score (x) [y] {z} ~`^ 100%",
]
FULL = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
KINDS = {
    "bpe": lambda captions: train_bpe(captions[:1000], 600, 24),
    "bpe-canonicalize": lambda captions: train_bpe(captions[:1000], 600, 24, "canonicalize"),
    "bpe-clip": lambda captions: train_bpe(captions[:1000], 600, 24, "clip"),
    "clip": lambda captions: clip_tokenizer(),
    "clip-canonicalize": lambda captions: load_tokenizer("clip", 20, "canonicalize"),
}


@pytest.fixture(scope="module")
def captions(shared_data):
    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".json")]
        return [text for member in members for text in json.load(shard.extractfile(member))["captions"]]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_equal_there_and_back(kind, captions, tmp_path):
    import tokenizers
    from transformers import AutoTokenizer

    ours = KINDS[kind](captions)
    write_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*captions[: 2000 if "clip" in kind else 5000], *(ODD[2:] if kind == "clip" else ODD)]
    expected = ours(texts)
    inputs = theirs(texts, **FULL)
    assert list(inputs) == ["input_ids"] and torch.equal(inputs["input_ids"], expected)
    back = TransformersTokenizer(tmp_path, ours.context_length)
    assert torch.equal(back(texts[-500:]), expected[-500:])
    for name in ("vocab_size", "pad_id", "eos_id", "bos_id"):
        assert getattr(back, name) == getattr(ours, name)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # without transformers
    assert torch.equal(torch.tensor([row.ids for row in raw.encode_batch(captions[:200])]), expected[:200])
    assert theirs.decode(expected[0], skip_special_tokens=True).split()[0] == captions[0].lower().split()[0]


def test_clips_files_are_clip_tokenizers(captions, tmp_path):
    from transformers import AutoTokenizer, CLIPTokenizer

    ours = clip_tokenizer()
    notes = write_tokenizer(ours, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"vocab.json", "merges.txt", "tokenizer.json"}
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), CLIPTokenizer)
    assert torch.equal(theirs(captions[:500], **FULL)["input_ids"], ours(captions[:500]))
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token_id) == ("<|startoftext|>", "<|endoftext|>", 0)
    assert theirs(["Tom &amp; Jerry"], **FULL)["input_ids"].tolist() != ours(["Tom &amp; Jerry"]).tolist()
    assert "HTML entities" in notes[0]


def test_what_cannot_be_written_is_noted(captions, tmp_path):
    bpe = train_bpe(captions[:500], 400, 24)
    assert write_tokenizer(bpe, tmp_path) == []
    loaded = TransformersTokenizer(tmp_path, 12)
    (tmp_path / "again").mkdir()
    assert write_tokenizer(loaded, tmp_path / "again") == []
    again = TransformersTokenizer(tmp_path / "again", 12)
    assert torch.equal(again(captions[:200]), bpe_rows(bpe, captions[:200], 12)) and again.core.model_max_length == 12
    loaded.clean = "canonicalize"
    assert "does not clean texts ('canonicalize')" in write_tokenizer(loaded, tmp_path / "again")[0]


def bpe_rows(tokenizer, texts, length):
    tokenizer.context_length = length
    return tokenizer(texts)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory, captions):
    """A small sentencepiece vocabulary as SigLIP's: pad and eos are '</s>', id 1."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spiece")
    (folder / "captions.txt").write_text("\n".join(text.lower() for text in captions[:1500]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "captions.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return folder / "spiece.model"


def test_siglips_sentencepiece(spiece, captions, tmp_path):
    from transformers import AutoTokenizer, SiglipTokenizer

    save_theirs(tmp_path, "SiglipModel", vocab_size=400, max_position_embeddings=16)
    SiglipTokenizer(str(spiece), model_max_length=16).save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), contrastive.load(tmp_path).tokenizer
    assert type(theirs) is SiglipTokenizer
    texts = [*captions[:800], "A dog, RUNNING on the beach!", "word " * 100, ""]
    assert torch.equal(ours(texts), theirs(texts, **FULL)["input_ids"])
    assert ours.pad_id == ours.eos_id == 1 and ours.context_length == 16
    ours.save(tmp_path / "saved")
    assert torch.equal(load_tokenizer(tmp_path / "saved")(texts), ours(texts))


def save_siglip2(folder, captions, **options):
    """A tokenizer as SigLIP 2's, trained here: lower-casing, eos at the end, padding on the left by default."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import Siglip2Tokenizer

    core = Tokenizer(models.BPE(byte_fallback=False))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    core.train_from_iterator([text.lower().replace(" ", "▁") for text in captions[:500]], trainer)
    model = json.loads(core.to_str())["model"]
    tokenizer = Siglip2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_siglip2_lower_cases_and_is_padded_on_the_right(captions, tmp_path):
    from transformers import AutoTokenizer, Siglip2Tokenizer

    save_theirs(tmp_path, "Siglip2Model", vocab_size=300, max_position_embeddings=16)
    save_siglip2(tmp_path, captions)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), contrastive.load(tmp_path).tokenizer
    assert type(theirs) is Siglip2Tokenizer and theirs.padding_side == "left"
    expected = theirs(captions[:500], max_length=16, padding_side="right", **FULL)["input_ids"]
    assert torch.equal(ours(captions[:500]), expected)
    assert torch.equal(ours("A DOG"), ours("a dog")) and ours("a dog")[0, -1] == ours.pad_id == 0


def test_clips_own_tokenizer(captions, tmp_path, capsys):
    from transformers import CLIPTokenizer

    source = tmp_path / "source"
    source.mkdir()
    write_tokenizer(clip_tokenizer(), source)
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (source / "merges.txt").read_text().splitlines()[1:]]
    theirs = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)  # OpenAI's: padded with eos
    save_theirs(tmp_path, "CLIPModel", vocab_size=49_408, max_position_embeddings=77, eos_token_id=2, hidden_size=16)
    theirs.save_pretrained(tmp_path)
    assert highest_id(tmp_path) == (49_407, True)
    bundle = contrastive.load(tmp_path)
    assert "guess" not in capsys.readouterr().err  # the end of a text has the highest id
    assert bundle.config.text.eos_id == bundle.tokenizer.eos_id == bundle.tokenizer.pad_id == 49_407
    assert torch.equal(bundle.tokenizer(captions[:500]), theirs(captions[:500], **FULL)["input_ids"])


@pytest.fixture
def trained(captions, tmp_path):
    write_tokenizer(train_bpe(captions[:300], 300, 16), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vocab_size": 200}, "its ids go up to 299, but vocab_size in config.json is 200"),
        ({"pool": "eos", "eos_id": 7}, "'<eos>' is id 1, but the text tower pools at id 7: set eos_token"),
    ],
)
def test_a_tokenizer_of_another_model_is_absent(trained, config, words):
    text = TextTowerConfig(**{"vocab_size": 300, "context_length": 16, **config})
    with pytest.raises(UserError, match=words) as caught:
        read_tokenizer(trained, text)(["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pad", "eos"])
def test_a_tokenizer_without_a_special_token_is_absent(trained, name):
    edit_json(trained / "tokenizer_config.json", **{f"{name}_token": None})
    description = json.loads((trained / "tokenizer.json").read_text())
    (trained / "tokenizer.json").write_text(json.dumps(description | {"padding": None}))
    text = TextTowerConfig(vocab_size=300, context_length=16)
    with pytest.raises(UserError, match=f"has no {name} token; name one as {name}_token in its tokenizer_config"):
        read_tokenizer(trained, text).encode  # noqa: B018


def test_a_tokenizer_that_makes_shorter_rows_is_absent(trained):
    """AutoProcessor pads to model_max_length, and a SigLIP text tower pools at the last position."""
    with pytest.raises(UserError, match="model_max_length in tokenizer_config.json is 16, max_position_emb.* is 20"):
        read_tokenizer(trained, TextTowerConfig(vocab_size=300, context_length=20))(["a"])


def test_a_clip_tokenizer_that_lacks_its_special_tokens_is_absent(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UserError, match="cannot read a tokenizer from folder .*endoftext") as caught:
        read_tokenizer(tmp_path, TextTowerConfig(vocab_size=300))(["a"])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_letters_is_absent(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, "c": 2}, [])).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no ids for the text 'a'"):
        read_tokenizer(tmp_path, TextTowerConfig(vocab_size=300))(["a"])


def test_a_damaged_tokenizer_is_absent(trained):
    (trained / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="cannot read a tokenizer from folder"):
        read_tokenizer(trained, TextTowerConfig(vocab_size=300))(["a"])
    assert highest_id(trained) == (None, False)
