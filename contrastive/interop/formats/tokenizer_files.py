"""Tokenizers out of folders of transformers and open_clip, and into them.

One that is read is checked against the text tower that it is to serve. What is written `AutoTokenizer` loads:
tokenizer.json, tokenizer_config.json, CLIP's vocabulary. What transformers has to be told, as its defaults are others:

padding, truncation   saved as defaults, which its processors take over; a bare tokenizer pads only when it is asked
model_input_names     ids alone: an attention mask would hide the padding that the towers have always seen
split_special_tokens  '<eos>' or '!' (CLIP's padding) in a text is text
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Core

from contrastive.data.tokenizer import (
    CLIP_BOS,
    CLIP_EOS,
    BpeTokenizer,
    Tokenizer,
    TransformersTokenizer,
    clip_tokenizer,
)
from contrastive.errors import UserError
from contrastive.files import read_json, write_json
from contrastive.interop.bundle import Absent
from contrastive.interop.formats import is_number
from contrastive.models import TextTowerConfig

MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (MODEL_FILE, "spiece.model", "tokenizer.model", "vocab.json")
CLIP_VOCABULARY, CLIP_EOS_ID, CLIP_PAD_ID = 49_408, 49_407, 0
# CLIP's special tokens, called by us as by open_clip, and as OpenAI and transformers call them.
CLIP_NAMES = {CLIP_BOS: "<|startoftext|>", CLIP_EOS: "<|endoftext|>"}
# open_clip's cleaning and ours. What its HFTokenizer does by default leaves the case alone.
CLEANINGS = {"whitespace": "whitespace", "lower": "clip", "canonicalize": "canonicalize"}
ASCII_PUNCTUATION = r"[!-/:-@\[-^`{-~]"  # all but '_'
CLEANING_NOTE = (
    "the exported tokenizer does not mend encoding slips and HTML entities as ours does (ftfy, html.unescape): texts "
    "of printable ASCII without '&' have the same ids"
)


def read_transformers_tokenizer(folder: Path, text: TextTowerConfig) -> Tokenizer | Absent:
    """Return the folder's tokenizer; `Absent`, with the reason, where it is missing, damaged or not the model's.

    Rows have the ids that the library gives with padding="max_length" and truncation=True, padded on the right
    whatever the folder says: that is how these models were trained.
    """
    if not any((folder / name).exists() for name in VOCABULARIES):
        return Absent(
            f"{folder} has no tokenizer ({', '.join(VOCABULARIES)}: none is there): copy its files from where the "
            "model came from"
        )
    try:
        # SigLIP's tower takes what it gets; CLIP's reads the eos, which has to be there.
        tokenizer = TransformersTokenizer(folder, text.context_length, add_eos=text.pool == "eos")
    except UserError as error:
        return Absent(str(error))
    wrong = _misfit(tokenizer, text)
    return tokenizer if wrong is None else Absent(f"the tokenizer in {folder} is not this model's: {wrong}")


def _misfit(tokenizer: TransformersTokenizer, text: TextTowerConfig) -> str | None:
    if tokenizer.vocab_size > text.vocab_size:
        return (
            f"its ids go up to {tokenizer.vocab_size - 1}, but vocab_size in config.json is {text.vocab_size}: copy "
            "the tokenizer of this very model"
        )
    longest = tokenizer.core.model_max_length
    if not is_number(longest) or longest < text.context_length:
        return (
            f"model_max_length in tokenizer_config.json is {longest}, max_position_embeddings in config.json is "
            f"{text.context_length}, so that the library makes shorter rows than the model has: set both alike"
        )
    if text.pool == "eos" and tokenizer.eos_id != text.eos_id:
        return (
            f"its eos token '{tokenizer.core.eos_token}' is id {tokenizer.eos_id}, but the text tower pools at id "
            f"{text.eos_id}: set eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    return None


def read_open_clip_tokenizer(text: Mapping[str, Any], folder: Path) -> Tokenizer | Absent:
    """Return the tokenizer that open_clip.get_tokenizer gives for the folder, with the same ids.

    Raises:
        UserError: the tokenizer's files are damaged.
    """
    is_clip = not text["hf_tokenizer_name"]
    arguments = dict(text["tokenizer_kwargs"] or {})
    clean = arguments.pop("clean", "lower" if is_clip else "whitespace")
    strange = [f"tokenizer_kwargs.{name}" for name, value in arguments.items() if value]
    if text["tokenizer_mode"]:
        strange.append(f"tokenizer_mode '{text['tokenizer_mode']}'")
    if clean not in tuple(CLEANINGS) or (is_clip and clean == "whitespace"):
        strange.append(f"tokenizer_kwargs.clean '{clean}'")
    if strange:
        return Absent(
            f"the model in {folder} has a tokenizer with {', '.join(strange)}, which ours cannot do; take the ids of "
            f"open_clip.get_tokenizer('local-dir:{folder}')"
        )
    if is_clip:
        tokenizer = clip_tokenizer(text["context_length"])
        tokenizer.clean = "canonicalize" if clean == "canonicalize" else "none"  # it always does what 'clip' does
    elif any((folder / name).exists() for name in (*VOCABULARIES, CONFIG_FILE, "vocab.txt")):
        tokenizer = TransformersTokenizer(folder, text["context_length"], add_eos=False)
        tokenizer.clean = CLEANINGS[clean]
        # What the folder asks for, which TransformersTokenizer overrides: in its files, else by its class.
        core, both = tokenizer.core, ("padding_side", "truncation_side")
        sides = [name for name in both if (core.init_kwargs.get(name) or getattr(type(core), name)) == "left"]
        if sides:
            return Absent(
                f"{folder / CONFIG_FILE} has {' and '.join(sides)} 'left', which open_clip follows and "
                f"ours cannot do; take the ids of open_clip.get_tokenizer('local-dir:{folder}')"
            )
    else:
        return Absent(
            f"{folder} lacks the files of its tokenizer '{text['hf_tokenizer_name']}' (tokenizer.json, "
            "tokenizer_config.json): copy them into the folder"
        )
    if tokenizer.vocab_size > text["vocab_size"]:
        named = f"its tokenizer has {tokenizer.vocab_size:,} ids"
        if is_clip:
            named = f"its config names no hf_tokenizer_name, so its tokenizer is CLIP's of {CLIP_VOCABULARY:,} ids"
        return Absent(f"the model in {folder} knows {text['vocab_size']:,} ids, but {named}: give it ids of your own")
    return tokenizer


def highest_id(folder: Path) -> tuple[int | None, bool]:
    """Return the highest id that a CLIP folder's tokenizer gives, and whether it is the token that ends a text.

    The tokenizer is not loaded; None where that cannot be told.
    """
    ids = _vocabulary(folder)
    highest = max(ids.values(), default=None)
    try:
        end = _read_if_there(folder / CONFIG_FILE).get("eos_token", CLIP_NAMES[CLIP_EOS])
    except UserError:
        return highest, False
    end = end.get("content") if isinstance(end, dict) else end
    return highest, highest is not None and isinstance(end, str) and ids.get(end) == highest


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids, added ones too; empty where the files cannot be read or hold something else."""
    try:
        if (folder / MODEL_FILE).exists():
            description = read_json(folder / MODEL_FILE)
            ids = {**description["model"]["vocab"]}
            ids |= {token["content"]: token["id"] for token in description["added_tokens"]}
        else:
            ids = read_json(folder / "vocab.json") | _read_if_there(folder / "added_tokens.json")
        added = _read_if_there(folder / CONFIG_FILE).get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(number) for number, token in added.items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return ids if all(isinstance(number, int) for number in ids.values()) else {}


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write the tokenizer into an existing folder, for `AutoTokenizer.from_pretrained`.

    With padding="max_length" and truncation=True, which the files name as defaults, it gives our ids.

    Returns:
        What the files cannot do as ours does, in plain sentences.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        return _write_transformers(tokenizer, folder)
    assert isinstance(tokenizer, BpeTokenizer)
    is_clip = tokenizer.kind == "clip"
    core = _with_names(tokenizer.core) if is_clip else Core.from_str(tokenizer.core.to_str())
    bos, eos, pad = (core.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    core.normalizer = _normalizer(tokenizer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_id), (eos, tokenizer.eos_id)]
    )
    pad_and_cut(core, tokenizer)
    core.save(str(folder / MODEL_FILE))
    # CLIPTokenizer makes its own normalizer, which cannot drop punctuation.
    own_class = is_clip and tokenizer.clean != "canonicalize"
    if own_class:
        core.model.save(str(folder))  # vocab.json and merges.txt
    config = {
        "tokenizer_class": "CLIPTokenizer" if own_class else "PreTrainedTokenizerFast",
        **{"bos_token": bos, "eos_token": eos, "pad_token": pad},
        **({"unk_token": eos} if is_clip else {}),
        "split_special_tokens": True,
    }
    write_json(folder / CONFIG_FILE, config | _defaults(tokenizer))
    return [CLEANING_NOTE] if is_clip or tokenizer.clean != "none" else []


def pad_and_cut(core: Core, tokenizer: Tokenizer) -> None:
    """Make a tokenizer of the tokenizers library pad and cut to our context length by itself."""
    core.enable_truncation(tokenizer.context_length)
    pad = core.id_to_token(tokenizer.pad_id)
    core.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad, length=tokenizer.context_length)


def write_open_clip_tokenizer(tokenizer: Tokenizer | Absent, folder: Path) -> tuple[dict, list[str]]:
    """Write the tokenizer's files, where it needs some; return entries of text_cfg and notes for the user."""
    named = {"hf_tokenizer_name": "local"}  # of a local-dir open_clip reads the folder, whatever the name
    if isinstance(tokenizer, Absent):
        return named, [
            "the model came without a tokenizer: open_clip looks for its files (tokenizer.json, ...) in the folder"
        ]
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.kind == "clip":
        clean = {"clean": "canonicalize"} if tokenizer.clean == "canonicalize" else {}
        return ({"tokenizer_kwargs": clean} if clean else {}), []
    clean = next((theirs for theirs, ours in CLEANINGS.items() if ours == tokenizer.clean), "whitespace")
    notes = []
    if tokenizer.clean == "none":
        notes.append(
            "open_clip mends encoding slips and HTML entities and squeezes white space before any tokenizer, which "
            "ours did not: texts without these have the same ids"
        )
    # open_clip cleans by itself, exactly as we do, so the files need not.
    plain = copy.copy(tokenizer)
    plain.clean = "none"
    return {**named, "tokenizer_kwargs": {"clean": clean}}, notes + write_tokenizer(plain, folder)


def _defaults(tokenizer: Tokenizer) -> dict:
    return {
        "model_max_length": tokenizer.context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "padding": "max_length",
        "truncation": True,
        "max_length": tokenizer.context_length,
        "model_input_names": ["input_ids"],
        "clean_up_tokenization_spaces": False,
    }


def _with_names(core: Core) -> Core:
    """Return CLIP's vocabulary with its two special tokens called as OpenAI and transformers call them."""
    description = json.loads(core.to_str())
    for token in description["added_tokens"]:
        token["content"] = CLIP_NAMES[token["content"]]
    model = description["model"]
    model["vocab"] = {CLIP_NAMES.get(word, word): index for word, index in model["vocab"].items()}
    return Core.from_str(json.dumps(description))


def _normalizer(tokenizer: BpeTokenizer) -> normalizers.Normalizer:
    """What is done to a text before its words are looked up: cleaning, then what the vocabulary itself asks for."""
    cleaning = "clip" if tokenizer.kind == "clip" and tokenizer.clean == "none" else tokenizer.clean
    steps = [tokenizer.core.normalizer] if tokenizer.core.normalizer is not None else []
    if cleaning == "none":
        return normalizers.Sequence(steps)
    cleaned = [
        normalizers.NFC(),
        normalizers.Replace(Regex("[\u2018-\u201b]"), "'"),
        normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
        normalizers.Lowercase(),
    ]
    if cleaning == "canonicalize":
        cleaned += [normalizers.Replace("_", " "), normalizers.Replace(Regex(ASCII_PUNCTUATION), "")]
    return normalizers.Sequence([*cleaned, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), *steps])


def _write_transformers(tokenizer: TransformersTokenizer, folder: Path) -> list[str]:
    """Save the library's own tokenizer, with our length and padding as its defaults."""
    tokenizer.core.save_pretrained(str(folder))
    config = read_json(folder / CONFIG_FILE)
    write_json(folder / CONFIG_FILE, config | _defaults(tokenizer))
    notes = []
    if tokenizer.clean != "none":
        notes.append(
            f"the exported tokenizer does not clean texts ('{tokenizer.clean}'), which ours did: do that before it"
        )
    if tokenizer.add_eos and not tokenizer.ends_with_eos:
        notes.append("the exported tokenizer does not end a text with its eos token, which ours did: add it to texts")
    return notes
