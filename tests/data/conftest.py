import pytest


@pytest.fixture
def images(tmp_path):
    """A folder with images a.jpg, b.jpg, c.jpg, each holding its own name, for tables beside it."""
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path
