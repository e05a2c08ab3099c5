import os
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (Flickr8k, CIFAR-10, MNIST); the test skips where it is absent."""
    folder = Path(os.environ.get("CONTRASTIVE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.md").exists():
        pytest.skip(f"needs the real data sets in {folder} (set CONTRASTIVE_DATA)")
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
