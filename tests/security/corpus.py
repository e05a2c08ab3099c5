"""Every reader of files from outside, with small valid files that it reads; see `sandbox.Reader`."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from mutations import Files
from sandbox import Reader

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "interop"), str(TESTS / "data"), str(TESTS / "evaluate")]

import reading  # noqa: E402
from corpus_data import Made, data_readers, files_in, made  # noqa: E402

from contrastive.errors import UserError  # noqa: E402


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
        from contrastive.interop.bundle import save_model

        bundle = small_bundle(kind)
        parts = bundle.model.state_dict(), bundle.config, bundle.preprocess.config
        write_folder(
            folder / "final", lambda to: save_model(to, *parts, bundle.tokenizer, class_names=bundle.class_names)
        )
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


def _captioner(folder: Path) -> None:
    from types import SimpleNamespace

    from small_bundles import small_bundle

    from contrastive.files import write_folder
    from contrastive.interop.bundle import save_model
    from contrastive.objectives.caption import CaptionConfig, decoder_for
    from contrastive.objectives.learner import save_objectives

    bundle = small_bundle("siglip")
    options = CaptionConfig(width=8, depth=1, num_heads=1, mlp_dim=8)
    decoder = decoder_for(options, bundle.config.image.width, bundle.tokenizer)
    weights = {f"objectives.caption.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}

    def fill(to: Path) -> None:
        save_model(to, bundle.model.state_dict(), bundle.config, bundle.preprocess.config, bundle.tokenizer)
        save_objectives(to / "objectives", [SimpleNamespace(name="caption", options=options)], weights, None)

    write_folder(folder / "final", fill)


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
    return data_readers() + [
        Reader("tokenizer bpe", made(_bpe), reading.read_tokenizer),
        Reader("tokenizer clip", made(_clip_files), reading.read_tokenizer),
        Reader("tokenizer sentencepiece", made(_sentencepiece), reading.read_tokenizer),
        Reader("tokenizer json", made(_exported("transformers", "clip")), reading.read_tokenizer),
        Reader("model ours", made(_native("siglip")), reading.read_run, seal_manifest),
        Reader("model classifier", made(_native("classifier")), reading.read_run, seal_manifest),
        Reader("captioner", made(_captioner), reading.read_captioner, seal_manifest),
        Reader("model transformers siglip", made(_transformers("SiglipModel")), reading.read_model),
        Reader("model transformers clip", made(_exported("transformers", "clip")), reading.read_model),
        Reader("model transformers native", made(_exported("transformers", "native")), reading.read_model),
        Reader("model timm native", made(_exported("timm", "native")), reading.read_model),
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
