"""The tokenizer in a folder of transformers, checked against the text tower that it is to serve."""

import json
from pathlib import Path

from contrastive.data.tokenizer import Tokenizer, TransformersTokenizer
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.models import TextTowerConfig

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
    if text.pool == "eos" and tokenizer.eos_id != text.eos_id:
        return (
            f"its eos token '{tokenizer.core.eos_token}' is id {tokenizer.eos_id}, but the text tower pools at id "
            f"{text.eos_id}: set eos_token in tokenizer_config.json or eos_token_id in config.json"
        )
    return None


def highest_id(folder: Path) -> int | None:
    """The highest id that the folder's tokenizer gives, without loading it; None where that cannot be told."""
    try:
        if (folder / "tokenizer.json").exists():
            description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            ids = [token["id"] for token in description["added_tokens"]] + [*description["model"]["vocab"].values()]
        else:
            ids = [*json.loads((folder / "vocab.json").read_text(encoding="utf-8")).values()]
        return max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
