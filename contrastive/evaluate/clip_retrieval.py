"""Embeddings in the layout of clip-retrieval (github.com/rom1504/clip-retrieval), which its index and its server read.

img_emb/img_emb_0.npy          (N, E) float16, of unit length
text_emb/text_emb_0.npy        (N, E) float16: of each image one caption, where captions are embedded
metadata/metadata_0.parquet    image_path, caption

Row n of the three is one sample. Files are numbered as the shards of the store, with as many digits for each.
"""

from pathlib import Path

import numpy as np

from contrastive.errors import UserError
from contrastive.evaluate.embedding_store import EmbeddingStore, Part, damage_told
from contrastive.files import write_whole

FOLDERS = {"images": ("img_emb", "image_path"), "texts": ("text_emb", "caption")}


def write_clip_retrieval(store: EmbeddingStore, parts: tuple[Part, ...]) -> int:
    """Write the embeddings of a store in its folder in that layout too; return the number of rows.

    Of an image the first caption that can be used is taken. With both parts, images without one are left out.

    Raises:
        UserError: features that are not of the projected space; or a shard that is damaged.
    """
    if store.options.space != "projected":
        raise UserError(f"{store.folder} holds {store.options.space} features; clip-retrieval searches projected ones")
    count, digits = 0, len(str(max(0, store.num_shards - 1)))
    for shard in range(store.num_shards):
        columns, features = _aligned({part: _read(store, part, shard) for part in parts})
        number, size = f"{shard:0{digits}d}", len(next(iter(columns.values())))
        if size == 0:
            continue
        for part, rows in features.items():
            _save(store.folder / FOLDERS[part][0] / f"{FOLDERS[part][0]}_{number}.npy", rows)
        _save_table(store.folder / "metadata" / f"metadata_{number}.parquet", columns)
        count += size
    return count


def _read(store: EmbeddingStore, part: Part, shard: int) -> tuple[dict[str, list], np.ndarray]:
    with damage_told(store.path(part, shard)):
        return store.read_shard(part, shard)


def _aligned(held: dict[Part, tuple[dict[str, list], np.ndarray]]) -> tuple[dict[str, list], dict[Part, np.ndarray]]:
    """The columns of metadata and the features of each part, of the samples that have all parts, once each."""
    places: dict[Part, dict[int, int]] = {}
    for part, (columns, _) in held.items():
        places[part] = {}
        for place, index in enumerate(columns["index"]):
            places[part].setdefault(index, place)
    common = [index for index in next(iter(places.values())) if all(index in own for own in places.values())]
    columns, features = {}, {}
    for part, (said, rows) in held.items():
        chosen = [places[part][index] for index in common]
        name = {"images": "key", "texts": "text"}[part]
        columns[FOLDERS[part][1]] = [said[name][place] for place in chosen]
        features[part] = np.asarray(rows)[chosen].astype(np.float16)
    return columns, features


def _save(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda file: np.save(file, rows))


def _save_table(path: Path, columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    write_whole(path, lambda file: pq.write_table(table, file))
