"""clip-retrieval's layout: three files whose rows are the same samples."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colour_model import ColourSource, bundle

from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import StoreOptions, claim_store, store_config
from contrastive.evaluate.embedding_writing import fill_store, write_clip_retrieval
from contrastive.evaluate.embeddings import embed_texts
from contrastive.evaluate.evaluated_model import load_embeddings

MODEL = {"path": "colours", "key": "0", "preprocess": {}}
TEXTS = {0: ("a red thing", "red"), 1: (" ",), 2: ("blue", "cyan"), 3: ("white",), 4: (), 5: ("green",)}


def store_of(folder, parts, **options):
    shown = ["red", "green", "blue", "yellow", "cyan", "white"]
    source = ColourSource(shown, texts=TEXTS, unreadable=(3,))
    store = claim_store(folder, store_config(MODEL, source, StoreOptions(samples_per_shard=2, **options)))
    fill_store(store, bundle(), source, parts, device="cpu")
    return store


def read(folder):
    names = sorted(path.stem.rpartition("_")[2] for path in (folder / "metadata").iterdir())
    tables = [pq.read_table(folder / "metadata" / f"metadata_{name}.parquet").to_pydict() for name in names]
    rows = {
        kind: [np.load(folder / kind / f"{kind}_{name}.npy") for name in names]
        for kind in ("img_emb", "text_emb")
        if (folder / kind).exists()
    }
    columns = {name: [value for table in tables for value in table[name]] for name in tables[0]}
    return names, columns, {kind: np.concatenate(found) for kind, found in rows.items()}


@pytest.mark.parametrize("files", ["parquet", "npy"])
def test_rows_of_the_three_are_the_same_samples(tmp_path, files):
    store = store_of(tmp_path, ("images", "texts"), files=files)
    assert write_clip_retrieval(store, ("images", "texts")) == 3
    names, columns, rows = read(tmp_path)
    assert names == ["0", "1", "2"] and columns == {
        "image_path": ["0", "2", "5"],  # the others have no picture that can be read, or no caption
        "caption": ["a red thing", "blue", "green"],
    }
    found = load_embeddings(tmp_path)  # it stays a store
    images = found.features[[found.keys.index(key) for key in columns["image_path"]]]
    texts = embed_texts(bundle().model, bundle().tokenizer, columns["caption"], device="cpu")
    for kind, expected in (("img_emb", images), ("text_emb", texts)):
        assert rows[kind].dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(rows[kind]).float(), expected, atol=1e-3, rtol=0)


def test_images_alone_are_all_there(tmp_path):
    assert write_clip_retrieval(store_of(tmp_path, ("images",)), ("images",)) == 5
    _, columns, rows = read(tmp_path)
    assert columns == {"image_path": ["0", "1", "2", "4", "5"]} and list(rows) == ["img_emb"]


def test_features_before_the_projection_are_refused(tmp_path):
    store = claim_store(tmp_path, store_config(MODEL, ColourSource(["red"]), StoreOptions(space="pooled")))
    with pytest.raises(UserError, match="clip-retrieval searches projected ones"):
        write_clip_retrieval(store, ("images",))
