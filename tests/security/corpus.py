"""Every reader of files from outside, with small valid files that it reads; see `sandbox.Reader`."""

import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import yaml
from mutations import Files
from PIL import Image
from sandbox import Reader

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "interop"), str(TESTS / "data"), str(TESTS / "evaluate")]

import pictures  # noqa: E402
import reading  # noqa: E402
import set_writing  # noqa: E402
import shard_writing  # noqa: E402

from contrastive.errors import UserError  # noqa: E402

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


def write_checkpoint(folder: Path, sharded: bool = False) -> None:
    from contrastive.data.preprocess import PreprocessConfig
    from contrastive.data.tokenizer import train_bpe
    from contrastive.interop.bundle import save_model
    from contrastive.train.checkpoint import training_state
    from contrastive.train.checkpoint import write_checkpoint as write

    model, optimizers, ema = reading.small_run()
    tokenizer, preprocess = train_bpe(["a cat"], 300, 8), PreprocessConfig(16)

    def save(into, weights, average):
        save_model(into, weights, model.config, preprocess, tokenizer, average)

    state = training_state(model, optimizers, ema, {"step": 4, "seed": 0, "epoch": 0})
    write(folder / "step-00000004", state, save, None, 0)
    if sharded:
        import torch.distributed.checkpoint as dcp
        from safetensors.torch import load_file

        whole = folder / "step-00000004" / "optimizer.safetensors"
        writer = dcp.HuggingFaceStorageWriter(str(whole.with_suffix("")), save_distributed=True)
        dcp.save(load_file(whole), storage_writer=writer, no_dist=True)
        whole.unlink()
        sealed = seal_manifest(files_in(folder))
        (folder / "step-00000004" / "manifest.json").write_bytes(sealed["step-00000004/manifest.json"])


def _native(kind: str) -> Made:
    def fill(folder: Path) -> None:
        from small_bundles import small_bundle

        from contrastive.files import write_folder
        from contrastive.interop.bundle import save_classifier, save_model

        bundle = small_bundle(kind)
        parts = bundle.model.state_dict(), bundle.config, bundle.preprocess.config
        save, last = (save_model, bundle.tokenizer) if bundle.tokenizer else (save_classifier, bundle.class_names)
        write_folder(folder / "final", lambda to: save(to, *parts, last))
        (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS | {"run_folder": "x"}))
        rows = [
            {"kind": "step", "step": 1, "loss": 2.0},
            {"kind": "eval", "step": 4, "zero_shot/digits:test/acc1": 50.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "zero_shot" / "digits").mkdir(parents=True)
        found = {"data": "digits:test", "acc1": 50.0, "num_samples": 10}
        (folder / "zero_shot" / "digits" / "zero_shot.json").write_text(json.dumps(found))

    return fill


def seal_manifest(files: Files) -> Files:
    """Write the sums of each folder with a manifest anew, as whoever changes a file can."""
    import hashlib

    for name in [name for name in files if name.endswith("manifest.json") and b"sha256" in files[name][:20]]:
        within = name.removesuffix("manifest.json")
        own = {
            path.removeprefix(within): data for path, data in files.items() if path.startswith(within) and path != name
        }
        sums = {path: hashlib.sha256(data).hexdigest() for path, data in own.items() if path.isprintable()}
        files = files | {name: json.dumps({"sha256": sums}).encode()}
    return files


def _exported(to: str, kind: str) -> Made:
    def fill(folder: Path) -> None:
        from small_bundles import small_bundle

        from contrastive.interop.export import export

        export(small_bundle(kind), to, folder / "model")
        for path in list((folder / "model").iterdir()):
            shutil.move(path, folder / path.name)
        for extra in ("README.md", "model"):
            shutil.rmtree(folder / extra) if (folder / extra).is_dir() else (folder / extra).unlink(missing_ok=True)

    return fill


def _transformers(name: str) -> Made:
    def fill(folder: Path) -> None:
        from transformers_models import save_theirs

        save_theirs(folder, name)

    return fill


def _sentencepiece(folder: Path) -> None:
    import sentencepiece

    texts = iter(["a photo of a cat", "two dogs on the beach", "a red circle and a blue star"] * 30)
    held = io.BytesIO()
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "pad_id": 3, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=held, **options)
    (folder / "spiece.model").write_bytes(held.getvalue())
    names = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"extra_ids": 0}))


def _bpe(folder: Path) -> None:
    from contrastive.data.tokenizer import train_bpe

    train_bpe(["a cat", "two dogs"] * 5, 280, 12).save(folder)


def _clip_files(folder: Path) -> None:
    """vocab.json and merges.txt, as CLIP's folders have them."""
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdogt", *(f"{c}</w>" for c in "abcdogt"), "ca", "cat</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    names = {"tokenizer_class": "CLIPTokenizer", "bos_token": words[0], "eos_token": words[1], "pad_token": words[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"unk_token": words[1]}))


def _sharded(folder: Path) -> None:
    write_checkpoint(folder, sharded=True)


def write_store(files: str) -> Made:
    def fill(folder: Path) -> None:
        from contrastive.evaluate.embedding_store import EmbeddingStore, StoreOptions, claim_store, store_config

        class Data:
            name, fingerprint, class_names, own_names, templates = "data", "0" * 16, ("a", "b"), None, None
            heldout_labels, stored = frozenset(), property(lambda self: self)
            __len__ = lambda self: 6  # noqa: E731

        identity = {"key": "k", "path": "final", "preprocess": {"image_size": 16}}
        options = StoreOptions(samples_per_shard=4, files=files)
        store: EmbeddingStore = claim_store(folder, store_config(identity, Data(), options))
        features = np.ones((4, 3), np.float32)
        for shard, rows in enumerate(([0, 1, 2, 3], [4, 5])):
            store.write("images", shard, [(i, f"k{i}", i % 2) for i in rows], features[: len(rows)], [])
            store.write("texts", shard, [(i, 0, "a cat") for i in rows], features[: len(rows)], [("empty", "k")])
        store.finish("images")
        store.finish("texts")

    return fill


OPTIONS = {
    "loss": {"name": "sigmoid"},
    "model": {"name": "clip_vit_b_16", "embed_dim": 16, "image": {"image_size": 16, "patch_size": 8, "width": 16}},
    "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0.1},
    "data": {"train": "digits:train", "eval": ["digits:test"], "augment": {"crop_scale": [0.5, 1.0]}},
    "train": {"steps": 8, "global_batch_size": 16, "precision": "fp32", "ema_decay": None},
    "evaluation": {"every": 4, "limit": 40},
}
SAVED = OPTIONS | {"model": {name: value for name, value in OPTIONS["model"].items() if name != "name"}}
SUITE = {
    "tasks": [
        {"task": "zero_shot", "data": "digits:test"},
        {"task": "linear_probe", "train": "digits:train", "test": "digits:test"},
    ]
}


OPTION_FILES = {"options.yaml": OPTIONS, "saved.yaml": SAVED}
CLASS_FILES = {"a.json": {"0": "cat", "1": "dog"}, "b.txt": "0: cat\n1: dog\n", "c.json": ["a", "b"]}
TEMPLATE_FILES = {"a-templates.txt": "a {}\nthe {c}\n", "b-templates.json": ["a {}", "b {}"]}
ONNX_FILES = {"image_tower.onnx": "\x08\x08\x12\x07pytorch", "config.json": {"format": "onnx", "preprocess": None}}
CHOICE_FILES = {
    "x.json": {"0": {"filename": "a.jpg", "caption": "a", "negative_caption": ["b"]}},
    "y.jsonl": {"id": 1, "image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": "y"},
}


def _text_files(content: dict) -> Files:
    """JSON, YAML or the text itself, by the names of the files."""
    made = {}
    for name, held in content.items():
        text = yaml.safe_dump(held) if name.endswith(".yaml") else json.dumps(held)
        made[name] = (held if isinstance(held, str) else text).encode()
    return made


def readers() -> list[Reader]:
    """Return them all. What reads is defined here, and what is read is made by the libraries that write it."""
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
        Reader("folder cifar", made(set_writing.cifar10), reading.source_at("")),
        Reader("tokenizer bpe", made(_bpe), reading.read_tokenizer),
        Reader("tokenizer clip", made(_clip_files), reading.read_tokenizer),
        Reader("tokenizer sentencepiece", made(_sentencepiece), reading.read_tokenizer),
        Reader("tokenizer json", made(_exported("transformers", "clip")), reading.read_tokenizer),
        Reader("model ours", made(_native("siglip")), reading.read_run, seal_manifest),
        Reader("model classifier", made(_native("classifier")), reading.read_run, seal_manifest),
        Reader("model transformers siglip", made(_transformers("SiglipModel")), reading.read_model),
        Reader("model transformers clip", made(_exported("transformers", "clip")), reading.read_model),
        Reader("model open_clip", made(_exported("open_clip", "clip")), reading.read_model),
        Reader("model timm", made(_exported("timm", "classifier")), reading.read_model),
        Reader("image encoder", made(_transformers("Siglip2VisionModel")), reading.read_encoder),
        Reader("model onnx", _text_files(ONNX_FILES), reading.read_model),
        Reader("checkpoint", made(write_checkpoint), reading.read_checkpoint, seal_manifest),
        Reader("checkpoint sharded", made(_sharded), reading.read_checkpoint, seal_manifest),
        Reader("options yaml", _text_files(OPTION_FILES), reading.read_options),
        Reader("suite yaml", _text_files({"suite.yaml": SUITE}), reading.read_suite),
        Reader("class names", _text_files(CLASS_FILES), reading.read_classes),
        Reader("templates", _text_files(TEMPLATE_FILES), reading.read_classes),
        Reader("compositional", _text_files(CHOICE_FILES), reading.read_choices),
        Reader("embeddings parquet", made(write_store("parquet")), reading.read_store),
        Reader("embeddings npy", made(write_store("npy")), reading.read_store),
    ]  # fmt: skip
    return found


def check(reader: Reader, folder: Path) -> None:
    """The files as they are have to be read, or what is changed in them says nothing."""
    from sandbox import put

    put(folder, reader.files)
    if reader.name in ("model onnx", "folder cifar"):  # which are refused as they are
        try:
            reader.read(folder)
        except UserError:
            return
        raise AssertionError(f"{reader.name} was read")
    reader.read(folder)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
