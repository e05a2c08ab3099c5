"""A name for what a model does to images and texts: embeddings of another one are never taken for its own."""

import hashlib
import json
import tempfile
from dataclasses import asdict, is_dataclass
from pathlib import Path

from contrastive.interop.bundle import Absent, weights_key


def model_key(bundle) -> str:
    """Return a sha256, in hex, over weights, architecture and tokenizer of `bundle`.

    The architecture counts because weights alone do not tell it: another number of heads fits the same tensors.
    The preprocessing is not in it; embeddings record it beside this key.
    """
    model = bundle.model
    options = asdict(model.config) if is_dataclass(model.config) else vars(model.config)
    parts = (
        weights_key(model),
        type(model).__name__,
        json.dumps(options, sort_keys=True, default=str),
        _tokenizer_key(bundle.tokenizer),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tokenizer_key(tokenizer) -> str:
    """A sha256 over the files that the tokenizer saves; empty without one, or without its files."""
    if tokenizer is None or isinstance(tokenizer, Absent):
        return ""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
