"""The code of docs/image-encoder.md runs as it stands there, on a small model."""

import re
from pathlib import Path

import torch
from test_load_image_encoder import picture, save_dual

from contrastive.models.image_encoder import ImageEncoder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "image-encoder.md"


def test_the_page_runs(tmp_path):
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text(), flags=re.MULTILINE)
    code = "\n".join(re.sub(r"^    ", "", line) for block in blocks for line in block.splitlines())
    assert code.count("load_image_encoder") == 4
    names = {"image": picture(), "torch": torch}
    exec(code.replace("runs/mine", str(save_dual(tmp_path / "model"))), names)
    assert names["tokens"].shape == (1, 16, 16) and names["grid"].shape == (1, 16, 4, 4)
    assert len(names["states"]) == 4 and names["pooled"].shape == (1, 16) and names["batch"].shape == (2, 3, 32, 32)
    assert [x.shape for x in names["last_two"]] == [(1, 16, 4, 4)] * 2
    assert isinstance(names["encoder"], ImageEncoder) and names["encoder"].grid_size == (8, 8)
