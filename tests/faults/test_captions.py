"""Row 26 of the fault matrix: captions that cannot be used are counted by reason, and cost no more than that."""

import json
import time

import numpy as np
import pytest
from pictures import encode
from PIL import Image
from shard_writing import write_tar

from contrastive.data.augment import AugmentConfig
from contrastive.data.loader import train_loader
from contrastive.data.order import Order
from contrastive.data.samples import PairDataset
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe

BAD_UTF8 = b"caf\xe9 \xff"
LONG = b"word " * 400_000  # 2 MB
PICTURE = encode(Image.fromarray(np.full((20, 24, 3), 90, np.uint8)), "JPEG")
UNUSABLE = {
    1: (b"", "empty_caption"),
    3: (b"nan", "null_caption"),
    4: (b" \t ", "empty_caption"),
    5: (b"None", "null_caption"),
    6: (BAD_UTF8, "bad_utf8"),
    9: (LONG, "too_long"),
}


def shard(folder):
    members = []
    for index in range(16):
        text = UNUSABLE.get(index, (f"number {index}".encode(),))[0]
        members += [(f"{index}.jpg", PICTURE), (f"{index}.txt", text)]
    return write_tar(folder / "pairs.tar", members)


def table(folder):
    rows = [b"image,caption"]
    for index in range(16):
        (folder / f"{index}.jpg").write_bytes(PICTURE)
        rows.append(b'%d.jpg,"%s"' % (index, UNUSABLE.get(index, (f"number {index}".encode(),))[0]))
    (folder / "pairs.csv").write_bytes(b"\n".join(rows))
    return str(folder / "pairs.csv")


def images_and_texts(folder):
    for index in range(16):
        (folder / f"{index:02d}.jpg").write_bytes(PICTURE)
        (folder / f"{index:02d}.txt").write_bytes(UNUSABLE.get(index, (f"number {index}".encode(),))[0])
    return str(folder)


def loaded(spec, **options):
    source, words = open_source(spec), train_bpe([f"number {index}" for index in range(16)], 300, 12)
    dataset = PairDataset(source, Order(len(source), 8, 0), words, 16, AugmentConfig())
    return list(train_loader(dataset, num_steps=2, **options)), words


@pytest.mark.parametrize("write", [shard, table, images_and_texts])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_row_26_unusable_captions_are_replaced_and_counted_by_reason(write, num_workers, tmp_path):
    spec = write(tmp_path)
    begun = time.process_time()
    batches, words = loaded(spec, num_workers=num_workers)
    assert time.process_time() - begun < 2
    texts = [words.decode(tokens) for batch in batches for tokens in batch["tokens"]]
    indices = [index for batch in batches for index in batch["index"].tolist()]
    assert texts == [f"number {index}" for index in indices] and not set(indices) & set(UNUSABLE)
    found = {(int("".join(filter(str.isdigit, key))), reason) for batch in batches for reason, key in batch["bad"]}
    # Where a source refuses to read 2 MB at all, it says so in its own words.
    found = {(index, "too_long" if reason in ("caption_too_long", "too_large") else reason) for index, reason in found}
    assert found == {(index, reason) for index, (_, reason) in UNUSABLE.items()}


def test_row_26_one_unusable_caption_of_several_does_not_cost_the_image(tmp_path):
    members = []
    for index in range(16):
        captions = ["", LONG.decode(), f"number {index}", "  "]
        members += [(f"{index}.jpg", PICTURE), (f"{index}.json", json.dumps({"captions": captions[:4:2]}).encode())]
    batches, words = loaded(write_tar(tmp_path / "pairs.tar", members))
    assert sorted(index for batch in batches for index in batch["index"].tolist()) == list(range(16))
    assert {reason for batch in batches for reason, _ in batch["bad"]} == {"empty_caption"}
    assert all(words.decode(tokens).startswith("number") for batch in batches for tokens in batch["tokens"])
