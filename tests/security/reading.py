"""What reads files from outside, each as a function of a folder; those that meet bad samples return how many."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from PIL import Image

from contrastive.data.decode import decode, decode_mask
from contrastive.data.record import BadSample
from contrastive.data.sources import open_source
from contrastive.data.sources.paths import read_image_file
from contrastive.errors import UserError


def read_image(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        data = read_image_file(str(path), path.name)
        decode(data)
        decode(data, min_side=4)


def read_source(spec: str) -> int:
    """Open a source and read some of its samples; return how many of them are bad."""
    source, bad = open_source(spec), 0
    for index in [*range(min(len(source), 6)), len(source) - 1]:
        for ask in (source.captions, source.label, lambda i: decode(source[i].image)):
            try:
                ask(index)
            except BadSample:
                bad += 1
    return bad


def read_masks(folder: Path) -> int:
    source, bad = open_source(str(folder)), 0
    for index in range(len(source)):
        try:
            record = source[index]
            decode_mask(record.mask, decode(record.image).shape[1:], source.mask_names, (255,), record.key)
        except BadSample:
            bad += 1
    return bad


def source_at(name: str) -> Callable[[Path], int]:
    return lambda folder: read_source(str(folder / name))


def read_shards(folder: Path) -> int:
    return read_source(f"{folder}/*.tar")


def read_index_folder(folder: Path) -> int:
    """The shards by their index, then as the folder's."""
    try:
        bad = read_source(str(folder / ".contrastive-index"))
    except UserError:
        bad = 1
    return bad + read_shards(folder)


def read_model(folder: Path) -> int:
    import contrastive

    bundle = contrastive.load(folder)
    bad = 0
    try:
        if bundle.tokenizer is not None:
            bundle.model.encode_text(bundle.tokenizer(["a cat", "<pad> ß", ""]))
    except UserError:
        bad += 1  # the folder's tokenizer is told of where it is used
    if bundle.preprocess:
        bundle.preprocess(Image.new("RGB", (50, 40)))
    return bad


def read_captioner(folder: Path) -> None:
    from contrastive.models.generate import GenerationConfig
    from contrastive.objectives.captioner import load_captioner

    captioner = load_captioner(folder)
    pixels = captioner.bundle.preprocess([Image.new("RGB", (50, 40))])
    captioner.write(pixels, GenerationConfig(), [0])


def read_encoder(folder: Path) -> None:
    import contrastive

    contrastive.load_image_encoder(folder, layer=-1)


def read_run(folder: Path) -> None:
    """The final model of a run, and what its card says of the run."""
    from contrastive.interop.run_record import RunRecord

    run = RunRecord.of(folder / "final")
    if run is not None:
        json.dumps([*run.data(), *run.recipe(), [r.written for r in run.results]])
        yaml.safe_dump(run.public_options())
    read_model(folder)


def read_tokenizer(folder: Path) -> None:
    from contrastive.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, None if (folder / "contrastive_tokenizer.json").exists() else 12)
    tokenizer.decode(tokenizer(["a cat", "<pad> ß", ""])[0])


def small_run(seed: int = 0):
    from contrastive.data.tokenizer import train_bpe
    from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
    from contrastive.optim import AdamWConfig, ExponentialMovingAverage

    torch.manual_seed(seed)
    size = {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    text = TextTowerConfig(vocab_size=train_bpe(["a cat"], 300, 8).vocab_size, context_length=8, **size)
    image = ImageTowerConfig(image_size=16, patch_size=8, **size)
    model = DualEncoder(ModelConfig(embed_dim=8, image=image, text=text, init_logit_bias=-3.0))
    optimizers = AdamWConfig().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers, ExponentialMovingAverage(model, 0.9)


def read_checkpoint(folder: Path) -> None:
    from contrastive.train.checkpoint import find_checkpoint, load_model, load_training_state, read_cursor

    found = find_checkpoint(folder)
    read_cursor(found)["step"]
    model, optimizers, ema = small_run(1)
    load_model(found, model)
    load_training_state(found, model, optimizers, ema)


def read_options(folder: Path) -> None:
    from contrastive.config import parse, to_dict
    from contrastive.train.contrastive_task import PretrainConfig

    to_dict(parse(PretrainConfig, [], folder / "options.yaml", prog="test", description=""))
    to_dict(parse(PretrainConfig, [], None, base=folder / "saved.yaml", prog="test", description=""))


def read_suite(folder: Path) -> None:
    from contrastive.evaluate.suite import read_suite

    read_suite(folder / "suite.yaml")


def read_classes(folder: Path) -> None:
    from contrastive.data.class_joining import load_class_set
    from contrastive.data.prompts import load_templates

    for path in sorted(folder.iterdir()):
        (load_templates if "templates" in path.name else load_class_set)(str(path))


def read_choices(folder: Path) -> None:
    from contrastive.evaluate import compositional

    for path in sorted(folder.iterdir()):
        compositional.read_choices(path)


def read_store(folder: Path) -> None:
    from contrastive.evaluate.embedding_store import find_store
    from contrastive.evaluate.evaluated_model import load_embeddings

    store = find_store(folder)
    if store is not None:
        store.missing("images")
    load_embeddings(folder, parts=("images", "texts"))
