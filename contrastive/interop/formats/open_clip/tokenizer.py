"""open_clip's tokenizers and ours."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.data.tokenizer import BpeTokenizer, Tokenizer, TransformersTokenizer, clip_tokenizer
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.open_clip.config import CLIP_VOCABULARY
from contrastive.interop.formats.tokenizer_files import write_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")
# open_clip's cleaning and ours. What HFTokenizer does by default leaves the case alone.
CLEANINGS = {"whitespace": "whitespace", "lower": "clip", "canonicalize": "canonicalize"}


def read_tokenizer(text: Mapping[str, Any], folder: Path) -> Tokenizer | Absent:
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
    elif any((folder / name).exists() for name in FILES):
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


def write_text_tokenizer(tokenizer: Tokenizer | Absent, folder: Path) -> tuple[dict, list[str]]:
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


def eos_problem(tokenizer: Tokenizer | Absent, eos_id: int | None) -> str | None:
    """Return what is wrong where the highest id is not this tokenizer's end of text, else None."""
    if isinstance(tokenizer, TransformersTokenizer) and tokenizer.eos_id != eos_id:
        return (
            f"pool_type 'argmax' takes the token of the highest id, which is {eos_id}, but texts of its tokenizer end "
            f"with {tokenizer.eos_id}; set text_cfg.pool_type to 'eos' and eos_id to {tokenizer.eos_id} if the model "
            "was trained so"
        )
    return None
