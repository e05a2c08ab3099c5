"""Small valid files of data, with what reads them: pictures, tables, shards, folders."""

import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pictures
import reading
import set_writing
import shard_writing
from mutations import Files
from PIL import Image
from sandbox import Reader

from contrastive.data.sources import open_source
from contrastive.data.sources.derived import as_found
from contrastive.data.sources.subset import FORMAT, KeptData, write_kept

Made = Callable[[Path], object]


def files_in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def made(fill: Made) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        return files_in(Path(folder))


def _tables() -> Iterable[tuple[str, Files]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = {f"{name}.jpg": pictures.encode(Image.fromarray(pictures.SMOOTH), "JPEG") for name in "abc"}
    rows = [{"image": f"{name}.jpg", "caption": f"a {name}", "label": n} for n, name in enumerate("abc")]
    lines = ["image,caption,label", *('{image},"{caption}, yes",{label}'.format(**row) for row in rows)]
    text = "\n".join(lines).encode() + b"\n"
    yield "x.csv", images | {"x.csv": text}
    yield "x.csv.gz", images | {"x.csv.gz": gzip.compress(text)}
    yield "x.tsv", images | {"x.tsv": text.replace(b'"', b"").replace(b", yes", b" yes").replace(b",", b"\t")}
    jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
    yield "x.jsonl", images | {"x.jsonl": jsonl}
    coco = {"images": [{"id": n, "file_name": row["image"]} for n, row in enumerate(rows)]}
    coco["annotations"] = [{"image_id": n, "caption": row["caption"]} for n, row in enumerate(rows)]
    yield "x.json", images | {"x.json": json.dumps(coco).encode()}
    features = {"label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"caption": [row["caption"] for row in rows], "label": [0, 1, 2]}
    held = {"image": [{"bytes": data, "path": name} for name, data in images.items()], **columns}
    for name, content in (("x.parquet", held), ("paths.parquet", {"image": list(images), **columns})):
        file = io.BytesIO()
        pq.write_table(pa.table(content).replace_schema_metadata(metadata), file)
        yield name, (images if name == "paths.parquet" else {}) | {name: file.getvalue()}


def _pictures() -> Iterable[tuple[str, bytes]]:
    smooth, exif = Image.fromarray(pictures.SMOOTH), Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"):
        yield kind.lower(), pictures.encode(smooth, kind, **({"exif": exif} if kind in ("JPEG", "PNG") else {}))
    frames = [smooth.convert("P"), smooth.rotate(90).convert("P")]
    yield "gif", pictures.encode(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=3)
    yield "png", pictures.encode(Image.fromarray(pictures.SMOOTH[..., 0].astype(np.uint16) * 200), "PNG")
    yield "png", pictures.encode(smooth.convert("P"), "PNG", transparency=3)
    yield "jpeg", pictures.encode(smooth.convert("CMYK"), "JPEG")
    yield "tiff", pictures.encode(smooth.convert("L"), "TIFF", compression="tiff_lzw")
    yield "webp", pictures.encode(smooth, "WEBP", save_all=True, append_images=[smooth.rotate(90)], lossless=True)


def _shard(folder: Path) -> None:
    png, jpeg = (pictures.encode(Image.fromarray(pictures.RGB), kind) for kind in ("PNG", "JPEG"))
    members = [("a.jpg", jpeg), ("a.txt", b"a cat"), ("a.json", b'{"caption": "a cat", "width": 9}'), ("a.cls", b"1")]
    members += [("b.png", png), ("b.txt", b"a dog\ntwo"), ("b.json", b"{}"), ("b.cls", b"0"), ("b.seg.png", png)]
    shard_writing.write_tar(folder / "s-000.tar", members, random.Random(0).choice([0, 1]))
    shard_writing.write_tar(
        folder / "s-001.tar", [("d/c.jpg", jpeg), ("d/c.json", b'{"captions": ["x", "y"], "weights": [1, 2]}')]
    )


def _indexed(folder: Path) -> None:
    _shard(folder)
    reading.read_shards(folder)


def _idx(folder: Path) -> None:
    set_writing.idx_files(folder, "train", "t10k")
    for name in ("train-labels-idx1-ubyte", "train-images-idx3-ubyte"):
        data = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        (folder / name).unlink()
    (folder / "classes.json").write_text(json.dumps([f"c{n}" for n in range(10)]))


def _folder(folder: Path) -> None:
    for number, name in enumerate("abc"):
        Image.fromarray(pictures.RGB).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}\nmore")
        (folder / f"{name}.json").write_text(json.dumps({"caption": f"the {name}", "n": number}))


def _class_folder(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        Image.fromarray(pictures.RGB).save(folder / name / "1.png")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")


def _mask_folder(folder: Path) -> None:
    for name in ("images", "masks", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for name in "ab":
        Image.fromarray(pictures.RGB).save(folder / "images" / f"{name}.png")
        Image.fromarray(pictures.RGB[..., 0] // 100).save(folder / "masks" / f"{name}.png")
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\n")
    (folder / "classnames.txt").write_text("ground\ncat\ndog\n")


def _metadata_folder(folder: Path) -> None:
    for name in "ab":
        Image.fromarray(pictures.RGB).save(folder / f"{name}.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a cat\nb.png,a dog\n")


def _saved_dataset(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = {"image": ["a.png", "b.png"], "text": ["a cat", "a dog"], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    for name in rows["image"]:
        Image.fromarray(pictures.RGB).save(folder / name)


def _kept(folder: Path) -> None:
    source = as_found(open_source("digits:test"))
    said = KeptData(FORMAT, "digits:test", None, None, source.fingerprint, len(source), 3)
    write_kept(folder, said, np.array([1, 5, 8]))


def data_readers() -> list[Reader]:
    found = [Reader(f"image {name}", {f"x.{name}": data}, reading.read_image) for name, data in _pictures()]
    found = [reader._replace(name=f"{reader.name} {n}") for n, reader in enumerate(found)]
    found += [Reader(f"table {name}", files, reading.source_at(name)) for name, files in _tables()]
    found += [
        Reader("shards", made(_shard), reading.read_shards),
        Reader("shard index", made(_indexed), reading.read_index_folder),
        Reader("idx", made(_idx), reading.source_at("")),
        Reader("folder captions", made(_folder), reading.source_at("")),
        Reader("folder classes", made(_class_folder), reading.source_at("")),
        Reader("folder masks", made(_mask_folder), reading.read_masks),
        Reader("folder metadata", made(_metadata_folder), reading.source_at("")),
        Reader("folder datasets", made(_saved_dataset), reading.source_at("")),
        Reader("folder kept", made(_kept), reading.source_at("")),
        Reader("folder cifar", made(set_writing.cifar10), reading.source_at("")),
    ]  # fmt: skip
    return found
