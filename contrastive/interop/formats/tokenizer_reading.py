"""Tokenizers out of folders of transformers and open_clip, checked against the text tower that they are to serve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.data.tokenizer import Tokenizer, TransformersTokenizer, clip_tokenizer
from contrastive.errors import UserError
from contrastive.files import read_json
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.option_kinds import is_number
from contrastive.models import TextTowerConfig

CLIP_VOCABULARY, CLIP_EOS, CLIP_PAD = 49_408, 49_407, 0
CLIP_END_OF_TEXT = "<|endoftext|>"
"""What ends a text of CLIP where tokenizer_config.json does not say so."""
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
# open_clip's cleaning and ours. What its HFTokenizer does by default leaves the case alone.
CLEANINGS = {"whitespace": "whitespace", "lower": "clip", "canonicalize": "canonicalize"}


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
    elif any((folder / name).exists() for name in (*VOCABULARIES, "tokenizer_config.json", "vocab.txt")):
        tokenizer = TransformersTokenizer(folder, text["context_length"], add_eos=False)
        tokenizer.clean = CLEANINGS[clean]
        sides = [name for name in ("padding_side", "truncation_side") if _own_side(tokenizer, name) == "left"]
        if sides:
            return Absent(
                f"{folder / 'tokenizer_config.json'} has {' and '.join(sides)} 'left', which open_clip follows and "
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


def _own_side(tokenizer: TransformersTokenizer, name: str) -> str:
    """The side that the folder asks for, which TransformersTokenizer overrides: of its files, else of its class."""
    return tokenizer.core.init_kwargs.get(name) or getattr(type(tokenizer.core), name)


def highest_id(folder: Path) -> int | None:
    """The highest id that the folder's tokenizer gives, without loading it; None where that cannot be told."""
    return max(_vocabulary(folder).values(), default=None)


def end_of_text_id(folder: Path) -> int | None:
    """The id of the token that ends a text of a CLIP folder, without loading its tokenizer; None as above."""
    try:
        named = _read_if_there(folder / "tokenizer_config.json").get("eos_token", CLIP_END_OF_TEXT)
    except UserError:
        return None
    named = named.get("content") if isinstance(named, dict) else named
    return _vocabulary(folder).get(named) if isinstance(named, str) else None


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids, added ones too; empty where the files cannot be read or hold something else."""
    try:
        if (folder / "tokenizer.json").exists():
            description = read_json(folder / "tokenizer.json")
            ids = {**description["model"]["vocab"]}
            ids |= {token["content"]: token["id"] for token in description["added_tokens"]}
        else:
            ids = read_json(folder / "vocab.json") | _read_if_there(folder / "added_tokens.json")
        added = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(number) for number, token in added.items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return ids if all(isinstance(number, int) for number in ids.values()) else {}


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
