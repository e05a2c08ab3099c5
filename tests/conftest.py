import contextlib
import functools
import itertools
import os
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A run small enough to be started many times.
TINY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32, dropout: 0.1}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "digits:train", eval: ["digits:test"], vocab_size: 300}
train: {steps: 8, global_batch_size: 16}
evaluation: {every: 4, limit: 40}
checkpoint: {every: 2}
"""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (Flickr8k, CIFAR-10, MNIST); the test skips where it is absent."""
    folder = Path(os.environ.get("CONTRASTIVE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.md").exists():
        pytest.skip(f"needs the real data sets in {folder} (set CONTRASTIVE_DATA)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """What a run in this process need not do again: wait for the disk, learn a tokenizer of the same captions."""
    from contrastive.data import settings

    @functools.lru_cache(maxsize=32)
    def learned(captions, *options):
        return train_bpe(captions, *options)

    train_bpe = settings.train_bpe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "train_bpe", lambda captions, *options: learned(tuple(captions), *options))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


_blocks = itertools.count(os.getpid())


@pytest.fixture
def free_port() -> int:
    """The first of 20 ports in a row that no other test has: below those that systems hand out by themselves."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for block in _blocks:
        port = 10_000 + 4_000 * (worker % 5) + 20 * (block % 200)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def tiny_text() -> str:
    return TINY


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def file(tmp_path):
    """Writes a text to a file, a.yaml by default; returns its path."""

    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
