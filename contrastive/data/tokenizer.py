"""Tokenizers: from text to rows of ids of one fixed length.

A row is `bos tokens eos pad pad ...` (no bos where a vocabulary has none). It always has `context_length`
ids: a SigLIP text tower pools its last position, so a shorter row would mean something else to it. Text that
is too long is cut so that eos still ends it, which is the position a CLIP text tower pools.
"""

import copy
import functools
import gzip
import itertools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from contrastive.data.captions import MAX_CAPTION_CHARS, Cleaning, caption_fault, clean_text
from contrastive.errors import UserError, did_you_mean, needs, reason_of
from contrastive.files import check_sizes, package_file, read_json, write_json
from contrastive.words import no_attribute

# The library's threads do not survive the fork of a loader worker, and one caption needs none.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OPTIONS_FILE = "contrastive_tokenizer.json"
MODEL_FILE = "tokenizer.json"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
BYTES = 256
CLIP_BOS, CLIP_EOS = "<start_of_text>", "<end_of_text>"
CLIP_CONTEXT_LENGTH = 77
PROBE = "a \U0010ffff"  # a character that no vocabulary has: one without an unk_token fails at it, if at all
CLIP_MERGES = 49152 - 256 - 2  # the file holds more; CLIP's vocabulary stops here
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer(ABC):
    """Text to int64 (B, context_length), and back. Picklable, and safe in forked processes.

    core: what the library has for it. kind: 'bpe' (trained on the run's captions), 'clip', or 'transformers'.
    vocab_size: rows that a token embedding needs.
    bos_id: None where no such token is placed.
    clean: what is done to texts first (see `clean_text`); saved, so that every use of a model cleans alike.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int | None
    clean: Cleaning = "none"
    _hides_special_tokens = True  # in a decoded text

    def __init__(self, core: Any, kind: str, context_length: int):
        if not 3 <= context_length < 2**20:
            raise UserError(f"context length {context_length} leaves no room for text or is none; set it to 3 or more")
        self.core, self.kind, self.context_length = core, kind, context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None, **others: Any) -> torch.Tensor:
        """Return int64 (B, context_length); one string is a batch of one. None: the model's own length.

        Raises UserError for what is no text, and for the options of transformers' tokenizers, of which this has none.
        """
        if others:
            raise UserError(
                f"a tokenizer has no option {', '.join(others)}: it always cuts, pads to {self.context_length} ids and "
                "returns one int64 tensor (B, context_length); tokenizer(texts, context_length=32) gives another length"
            )
        texts = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"texts to tokenize are strings, and a list of them; not {type(text).__name__}")
            if caption_fault(text[:MAX_CAPTION_CHARS]) == "bad_utf8":
                raise UserError(f"'{text[:80]}' cannot be tokenized: it holds half a character (a lone surrogate)")
        return self.with_length(context_length).tokenize_clean([self.cleaned(text) for text in texts])

    def with_length(self, context_length: int | None) -> "Tokenizer":
        """Return this tokenizer for texts of another number of ids; itself for None."""
        if context_length in (None, self.context_length):
            return self
        other = copy.copy(self)
        Tokenizer.__init__(other, self.core, self.kind, context_length)
        return other

    def __len__(self) -> int:
        """The size of the vocabulary, as in transformers."""
        return self.vocab_size

    def __getattr__(self, name: str) -> Any:
        raise no_attribute("tokenizer", self, name)

    def cleaned(self, text: str) -> str:
        """Return the text as it is tokenized."""
        return clean_text(text, self.clean)

    def tokenize_clean(self, texts: list[str]) -> torch.Tensor:
        """Return int64 (B, context_length) of texts that `cleaned` returned."""
        rows = self._encode(texts)
        padded = np.full((len(rows), self.context_length), self.pad_id, np.int64)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return torch.from_numpy(padded)

    def num_tokens(self, text: str) -> int:
        """Return how many ids a text has before it is cut, special ones included."""
        uncut = copy.copy(self)
        uncut.context_length = MAX_CAPTION_CHARS * 4  # which no caption reaches
        return len(uncut._encode([self.cleaned(text)])[0])

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """Return the text of one row of ids, as the vocabulary keeps it (lower-cased for BPE), up to eos."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        if ids and ids[0] == self.bos_id:
            ids = ids[1:]
        return self.core.decode(ids, skip_special_tokens=self._hides_special_tokens).strip()

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary and a small JSON of the options; `load_tokenizer(folder)` reads them back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        names = ("kind", "vocab_size", "context_length", "pad_id", "eos_id", "bos_id", "clean", "add_eos")
        write_json(folder / OPTIONS_FILE, {name: getattr(self, name) for name in names if hasattr(self, name)})

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return rows of at most context_length ids, each ended by eos, not padded."""

    @abstractmethod
    def _save(self, folder: Path) -> None: ...


class BpeTokenizer(Tokenizer):
    """A BPE of the `tokenizers` library: CLIP's or a trained one. Every row begins with bos."""

    _hides_special_tokens = False  # a text that names them means their characters

    def __init__(self, core: tokenizers.Tokenizer, kind: str, context_length: int):
        super().__init__(core, kind, context_length)
        self.vocab_size = max(core.get_vocab().values(), default=-1) + 1
        self.eos_id, self.bos_id = map(core.token_to_id, (CLIP_EOS, CLIP_BOS) if kind == "clip" else (EOS, BOS))
        # CLIP pads with 0, the id of '!': harmless, as nothing behind eos is looked at.
        self.pad_id = 0 if kind == "clip" else core.token_to_id(PAD)

    def _encode(self, texts):
        if self.kind == "clip":
            texts = [clean_text(text, "clip") for text in texts]
        room = self.context_length - 2
        encoded = (self.core.encode(text, add_special_tokens=False).ids for text in texts)
        return [[self.bos_id, *ids[:room], self.eos_id] for ids in encoded]

    def _save(self, folder):
        self.core.save(str(folder / MODEL_FILE))


class TransformersTokenizer(Tokenizer):
    """A tokenizer folder of transformers, padded on the right whatever its own default is.

    Special tokens at the front are its own doing.

    Args:
        add_eos: end a text by eos where the tokenizer does not do so by itself. False gives the library's own ids,
            which are what a model of the library was trained on.
    """

    def __init__(self, folder: Path, context_length: int, add_eos: bool = True):
        core, ids = _read_core(folder)
        for name in ("pad", "eos"):
            if getattr(core, f"{name}_token_id") is None:
                raise UserError(
                    f"the tokenizer in '{folder}' has no {name} token; "
                    f"name one as {name}_token in its tokenizer_config.json"
                )
        core.padding_side = core.truncation_side = "right"
        super().__init__(core, "transformers", context_length)
        self.vocab_size = max(core.get_vocab().values()) + 1
        self.pad_id, self.eos_id = core.pad_token_id, core.eos_token_id
        self.bos_id = core.bos_token_id if ids[0] == core.bos_token_id else None
        self.add_eos, self.ends_with_eos = add_eos, ids[-1] == core.eos_token_id

    def _encode(self, texts):
        if not texts:
            return []
        rows = self.core(texts, truncation=True, max_length=self.context_length)["input_ids"]
        if not self.add_eos:
            return rows
        return [
            row if row and row[-1] == self.eos_id else [*row[: self.context_length - 1], self.eos_id] for row in rows
        ]

    def _save(self, folder):
        self.core.save_pretrained(str(folder))


def _read_core(folder: Path):
    """A tokenizer of transformers, and its ids of a text of one letter."""
    needs(f"the tokenizer of transformers in '{folder}'", "transformers")
    import transformers

    named = read_json(config) if (config := folder / "tokenizer_config.json").is_file() else {}
    check_sizes(named, config, {"model_max_length": math.inf})  # a length of 10^30 stands for none
    # Beside a Siglip2 model AutoTokenizer takes anything for Gemma's tokenizer, these too, which ours are written as.
    plain = named.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend", "CLIPTokenizer")
    reader = getattr(transformers, named["tokenizer_class"] if plain else "AutoTokenizer")
    try:
        core = reader.from_pretrained(str(folder), local_files_only=True)
        ids, _ = core("a")["input_ids"], core(PROBE)
    except Exception as error:  # a damaged folder fails in as many ways as it has files
        raise UserError(f"cannot read a tokenizer from folder '{folder}': {reason_of(error)}") from error
    if not ids:
        raise UserError(f"the tokenizer in '{folder}' has no ids for the text 'a', no unk_token: copy the whole folder")
    return core, ids


def train_bpe(
    captions: Iterable[str], vocab_size: int = 8192, context_length: int = 64, clean: Cleaning = "none"
) -> Tokenizer:
    """Learn a byte-level BPE: ids 0, 1, 2 are PAD, EOS, BOS, then the 256 bytes, then merges by frequency.

    Text is NFC-normalised, lower-cased, and runs of white space are one space. Every text can be encoded,
    and the same captions in any order give the same vocabulary. It may come out smaller than `vocab_size`,
    as a merge has to be seen twice. Captions that training would skip (empty, overlong, not text) are skipped here
    too.

    Raises:
        UserError: no captions, or a vocabulary too small for the bytes.
    """
    smallest = BYTES + 3
    if vocab_size < smallest:
        raise UserError(f"tokenizer vocabulary size {vocab_size} is too small; set it to {smallest} or more")
    usable = filter(None, (clean_text(caption, clean) for caption in captions if caption_fault(caption) is None))
    if (first := next(usable, None)) is None:
        raise UserError("no captions to train a tokenizer on; check the data spec and its caption column")
    core = tokenizers.Tokenizer(models.BPE())
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
    core.train_from_iterator(itertools.chain([first], usable), trainer)
    # The special tokens stay in the vocabulary but are no longer looked for in text: a caption that holds
    # the characters '<eos>' is ordinary text.
    core = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), "added_tokens": []}))
    tokenizer = BpeTokenizer(core, "bpe", context_length)
    tokenizer.clean = clean
    return tokenizer


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    missing = "CLIP's vocabulary comes with open_clip_torch; pip install open_clip_torch"
    with gzip.open(package_file("open_clip", missing, "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    # Byte order of the original: printable bytes first, then the rest under the characters from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters] + [a + b for a, b in merges]
    return {word: index for index, word in enumerate([*words, CLIP_BOS, CLIP_EOS])}, merges


def clip_tokenizer(context_length: int = CLIP_CONTEXT_LENGTH) -> Tokenizer:
    """Return CLIP's tokenizer of 49,408 tokens (Radford et al., 2021): ids identical to open_clip's, padded with 0."""
    vocabulary, merges = _clip_vocabulary()
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    # CLIP looks for its special tokens in text too.
    core.add_special_tokens([AddedToken(token, normalized=False) for token in (CLIP_BOS, CLIP_EOS)])
    return BpeTokenizer(core, "clip", context_length)


def load_tokenizer(
    name_or_folder: str | Path, context_length: int | None = None, clean: Cleaning | None = None
) -> Tokenizer:
    """Return the tokenizer called 'clip', or the one in a folder saved by us or by transformers.

    context_length: None takes the saved one, or 77 for CLIP; a folder of transformers needs it given.
    clean: None takes the saved one, or 'none'.

    Raises:
        UserError: no such tokenizer, no pad or eos token, or special ids that the vocabulary does not have.
    """
    folder = Path(name_or_folder)
    if str(name_or_folder) == "clip":
        tokenizer = clip_tokenizer(context_length or CLIP_CONTEXT_LENGTH)
    elif not folder.is_dir():
        raise UserError(
            f"no tokenizer '{name_or_folder}': neither 'clip' nor a folder."
            f"{did_you_mean(str(name_or_folder), ['clip'])}"
        )
    elif (folder / OPTIONS_FILE).exists():
        tokenizer = _load_saved(folder, context_length)
    elif context_length is None:
        raise UserError(f"the tokenizer in '{folder}' does not say how long a text is; give a context length")
    else:
        tokenizer = TransformersTokenizer(folder, context_length)
    tokenizer.clean = clean or tokenizer.clean
    return tokenizer


def _read_bpe(file: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in a file; UserError where it is none, or cannot take any text."""
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
        core.encode(PROBE, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more special
        raise UserError(f"cannot read the tokenizer {file}: {reason_of(error)}; copy the whole folder again") from None
    return core


def _load_saved(folder: Path, context_length: int | None) -> Tokenizer:
    options = read_json(folder / OPTIONS_FILE)
    again = "copy the whole folder again from the run that made it"
    kind, length, clean = options.get("kind"), context_length or options.get("context_length"), options.get("clean")
    known = kind in ("bpe", "clip", "transformers") and clean in (None, *get_args(Cleaning))
    if not known or type(length) is not int:
        raise UserError(f"{folder / OPTIONS_FILE}: kind {kind!r}, clean {clean!r}, length {length!r}: damaged; {again}")
    if kind == "transformers":
        tokenizer = TransformersTokenizer(folder, length, options.get("add_eos", True) is True)
    else:
        tokenizer = BpeTokenizer(_read_bpe(folder / MODEL_FILE), kind, length)
    for name in ("vocab_size", "pad_id", "eos_id", "bos_id"):
        held, said = getattr(tokenizer, name), options.get(name)
        if held != said or (held is None and (kind, name) != ("transformers", "bos_id")):
            raise UserError(f"the tokenizer in '{folder}' has {name} {held} but {OPTIONS_FILE} says {said}; {again}")
    tokenizer.clean = clean or "none"
    return tokenizer
