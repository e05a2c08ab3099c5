"""Byte-pair encodings on the `tokenizers` library: CLIP's, and one trained on the captions of a run.

Neither adds its special tokens by itself: the callers place them (see tokenizer.py).
"""

import functools
import gzip
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from contrastive.errors import UserError

# The library's threads do not survive the fork of a loader worker, and one caption needs none.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BYTES = 256
CLIP_BOS, CLIP_EOS = "<start_of_text>", "<end_of_text>"
CLIP_MERGES = 49152 - 256 - 2  # the file holds more; CLIP's vocabulary stops here
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE: ids 0, 1, 2 are PAD, EOS, BOS, then the 256 bytes, then merges by frequency.

    Text is NFC-normalised, lower-cased, and runs of white space are one space. Every text can be encoded,
    and the same captions in any order give the same vocabulary. It may come out smaller than `vocab_size`,
    as a merge has to be seen twice.

    Raises:
        UserError: no captions, or a vocabulary too small for the bytes.
    """
    smallest = BYTES + 3
    if vocab_size < smallest:
        raise UserError(f"tokenizer vocabulary size {vocab_size} is too small; set it to {smallest} or more")
    core = Tokenizer(models.BPE())
    squeeze = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *squeeze])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, EOS, BOS],  # transformers' CLIPModel reads an eos of 2 as "the highest id of the text"
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted():
        nonlocal seen
        for caption in captions:
            seen += 1
            yield caption

    core.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("no captions to train a tokenizer on; check the data spec and its caption column")
    # The special tokens stay in the vocabulary but are no longer looked for in text: a caption that holds
    # the characters '<eos>' is ordinary text.
    return Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), "added_tokens": []}))


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    package = importlib.util.find_spec("open_clip")  # finds the folder without importing the package
    if package is None or not package.submodule_search_locations:
        raise UserError("CLIP's vocabulary comes with open_clip_torch; pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    # Byte order of the original: printable bytes first, then the rest under the characters from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters] + [a + b for a, b in merges]
    return {word: index for index, word in enumerate([*words, CLIP_BOS, CLIP_EOS])}, merges


def clip() -> Tokenizer:
    """Return CLIP's BPE with its 49,408 tokens; give it text that went through `clean_clip`."""
    vocabulary, merges = _clip_vocabulary()
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    # CLIP looks for its special tokens in text too.
    core.add_special_tokens([AddedToken(token, normalized=False) for token in (CLIP_BOS, CLIP_EOS)])
    return core
