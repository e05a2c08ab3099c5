"""The tokenizer in a folder of transformers, checked against the text tower that it is to serve."""

import json
from pathlib import Path

from contrastive.data.tokenizer import Tokenizer, TransformersTokenizer
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.transformers.options import is_number
from contrastive.models import TextTowerConfig

CLIP_EOS = "<|endoftext|>"
"""What ends a text of CLIP where tokenizer_config.json does not say so."""
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")


def read_tokenizer(folder: Path, text: TextTowerConfig) -> Tokenizer | Absent:
    """Return the folder's tokenizer; `Absent`, with the reason, where it is missing, damaged or not the model's.

    Rows have the ids that the library gives with padding="max_length" and truncation=True, padded on the right
    whatever the folder says: that is how these models were trained.
    """
    if not any((folder / name).exists() for name in FILES):
        return Absent(
            f"{folder} has no tokenizer ({', '.join(FILES)}: none is there): copy its files from where the model came "
            "from"
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


def highest_id(folder: Path) -> int | None:
    """The highest id that the folder's tokenizer gives, without loading it; None where that cannot be told."""
    return max(_vocabulary(folder).values(), default=None)


def end_of_text_id(folder: Path) -> int | None:
    """The id of the token that ends a text of a CLIP folder, without loading its tokenizer; None as above."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        named = named["content"] if isinstance(named, dict) else named
        return _vocabulary(folder).get(named)
    except (OSError, KeyError):
        return _vocabulary(folder).get(CLIP_EOS)
    except (ValueError, TypeError, RecursionError):
        return None


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids, added ones too; empty where the files cannot be read or hold something else."""
    try:
        if (folder / "tokenizer.json").exists():
            description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            ids = {**description["model"]["vocab"]}
            ids |= {token["content"]: token["id"] for token in description["added_tokens"]}
        else:
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            if (folder / "added_tokens.json").exists():
                ids |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        config = folder / "tokenizer_config.json"
        added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder") if config.exists() else None
        ids |= {token["content"]: int(number) for number, token in (added or {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return ids if all(isinstance(number, int) for number in ids.values()) else {}
