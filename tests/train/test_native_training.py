"""Training on images in their own aspect: exact on resume, ranks and in micro-batches; what goes with it, what not."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import assert_same_run, pretrain_here, rows
from native_model import save_native
from PIL import Image
from rank_processes import joined, run_on_ranks
from safetensors.torch import load_file

import contrastive
from contrastive.config import parse
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.losses import LOSSES
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from contrastive.objectives.caption import Caption
from contrastive.objectives.objective import MicroBatch
from contrastive.patches import Patches
from contrastive.train.classify import TrainClassifierConfig, train_classifier
from contrastive.train.counting import one_pass
from contrastive.train.finetune import FinetuneConfig, finetune
from contrastive.train.gradient import Batch, forward_backward
from contrastive.train.options import TrainConfig, micro_batches
from contrastive.train.plan import PlanConfig, make_plan
from contrastive.train.run import command

FILE = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 4, width: 16, depth: 1, num_heads: 2, mlp_dim: 32, native: true}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: PAIRS, vocab_size: 300, native: {patches: [8, 12, 16]}, augment: {crop_scale: [0.5, 1.0], flip: true}}
train: {steps: 6, global_batch_size: 8}
schedule: {warmup_steps: 0}
checkpoint: {every: 3, keep: 9}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of images of many shapes, the file of a run on them, that run, and one on squares of the same model."""
    folder = tmp_path_factory.mktemp("native")
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for number in range(24):
            size = [(24, 24), (12, 48), (48, 12), (30, 20), (17, 33)][number % 5]
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
            table.writerow((f"{number}.png", f"picture {number}"))
    (folder / "native.yaml").write_text(FILE.replace("PAIRS", str(folder / "pairs.csv")))
    square = (
        (folder / "native.yaml")
        .read_text()
        .replace(", native: true", "")
        .replace("native: {patches: [8, 12, 16]}, ", "")
    )
    (folder / "square.yaml").write_text(square)
    pretrain_here(
        "--config", folder / "native.yaml", "--run_folder", folder / "whole", "--data.eval", folder / "pairs.csv"
    )
    pretrain_here("--config", folder / "square.yaml", "--run_folder", folder / "square", "--train.steps", "2")
    return folder


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def test_a_run_gives_a_native_model_and_goes_on_exactly(folder, tmp_path):
    whole = folder / "whole"
    bundle = contrastive.load(whole)
    config = bundle.preprocess.config
    assert (config.resize, config.patch_size, config.most_patches) == ("native", 4, 16) and bundle.config.image.native
    assert (whole / "report.html").exists() and rows(whole, "eval")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    pretrain_here("--run_folder", tmp_path / "run", "--resume", "--data.num_workers", "1")
    assert_same_run(tmp_path / "run", whole)
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(tmp_path / "run").items())


def test_micro_batches_by_tokens_learn_the_same(folder, tmp_path):
    pretrain_here(
        *("--config", folder / "native.yaml", "--run_folder", tmp_path / "run", "--train.micro_batch_tokens", "32")
    )
    ours, theirs = ([row["loss"] for row in rows(run)] for run in (tmp_path / "run", folder / "whole"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_micro_batches_are_as_few_as_fit():
    train = TrainConfig(micro_batch_tokens=100)
    found = [micro_batches(train, 12, patches) for patches in (4, 8, 9, 16, 17, 25, 26, 50, 51, 100)]
    assert found == [1, 1, 2, 2, 3, 3, 4, 6, 12, 12]
    assert micro_batches(TrainConfig(accumulate=3), 12, None) == 3


CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32, native=True),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_bias=-3.0,
)


def gradients(parts, runtime, rank=0, world_size=1):
    torch.manual_seed(0)
    model = DualEncoder(CONFIG).double()
    generator = torch.Generator().manual_seed(1)
    grids = [[(1, 8), (3, 3), (5, 2), (2, 4)][i % 4] for i in range(8)]
    sizes = ((3, 4 * height, 4 * width) for height, width in grids)
    images = [Patches.of(torch.randn(size, generator=generator, dtype=torch.float64), 4) for size in sizes]
    tokens = torch.randint(0, 20, (8, 6), generator=generator).chunk(world_size)[rank]
    batch = Batch(Patches.batch(images).chunk(world_size)[rank], tokens.chunk(parts), tokens[:, 0])
    value = forward_backward(runtime.wrap(model), LOSSES.get("sigmoid")().build(), batch, seed=(0, 5), runtime=runtime)
    return value["loss"], {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_on_ranks(rank, port, expected):
    runtime = joined(rank, 2, port)
    for parts in (1, 2):
        _, found = gradients(parts, runtime, rank, 2)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_gradients_are_those_of_the_whole_batch(free_port):
    value, expected = gradients(1, Runtime("fp32"))
    for parts in (2, 8):
        other, found = gradients(parts, Runtime("fp32"))
        torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=name)
    run_on_ranks(2, assert_gradients_on_ranks, free_port, expected)


def test_objectives_see_no_padding():
    """Features and captions of a batch are those of each image alone."""
    torch.manual_seed(0)
    model = DualEncoder(CONFIG).eval()
    images = [Patches.of(torch.randn(3, 4 * rows, 4 * columns), 4) for rows, columns in ((1, 8), (2, 2))]
    options = CaptionDecoderConfig(width=16, depth=2, num_heads=2, mlp_dim=16)
    captions = SimpleNamespace(decoder=CaptionDecoder(options, 16, vocab_size=20, context_length=6, eos_id=1).eval())
    ids = torch.randint(2, 20, (2, 2, 6))
    inputs = {"ids": ids, "weights": captions.decoder.weights(ids.flatten(0, 1)).unflatten(0, (2, 2))}
    inputs["parallel"] = torch.tensor([[True, False]] * 2)
    # What embeds an image alone has no padding, so nothing that could be looked at.
    whole = MicroBatch(model, Patches.batch(images), ids[:, 0])
    alone = [MicroBatch(model, images[i][None], ids[i : i + 1, 0]) for i in range(2)]
    torch.testing.assert_close(whole.features.image, torch.cat([part.features.image for part in alone]))
    torch.testing.assert_close(whole.features.image, model.encode_image(whole.pixels))
    each = [
        Caption.loss(captions, part, {name: rows[i : i + 1] for name, rows in inputs.items()}, {})
        for i, part in enumerate(alone)
    ]
    torch.testing.assert_close(Caption.loss(captions, whole, inputs, {}), sum(each) / 2)


def test_what_a_mean_of_patches_aims_at_is_each_images_own(folder, tmp_path):
    """Padding has no part in it: one micro-batch of all images and one of each learn the same."""
    flags = ("--config", folder / "native.yaml", "--objectives", "patch_mean", "--train.steps", "2")
    for name, tokens in (("whole", ()), ("parts", ("--train.micro_batch_tokens", "16"))):
        pretrain_here(*flags, *tokens, "--run_folder", tmp_path / name)
    whole, parts = (rows(tmp_path / name) for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert one["patch_mean_loss"] == pytest.approx(other["patch_mean_loss"], rel=1e-5)


def test_captions_and_a_model_to_start_from(folder, tmp_path):
    """Two stages: a model of squares goes on natively with the same weights, and that one with smaller patches."""
    start = ("--init", folder / "square", "--data", folder / "pairs.csv", "--train.global_batch_size", "8")
    words = (*start, "--model.image.native", "--train.steps", "2", "--optimizer.lr", "1e-9")
    caption = ("--objectives", "caption", "--train.micro_batch_tokens", "64", "--data.native.patches", "8", "16")
    pretrain_here(*words, *caption, "--config", folder / "native.yaml", "--run_folder", tmp_path / "two")
    before, after = weights(folder / "square"), weights(tmp_path / "two")
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)
    assert contrastive.load(tmp_path / "two").preprocess.config.resize == "native"
    assert all(row["caption_loss"] > 0 for row in rows(tmp_path / "two"))
    words = ("--init", tmp_path / "two", "--data", folder / "pairs.csv", "--train.global_batch_size", "8")
    smaller = ("--model.image.patch_size", "2", "--train.steps", "1", "--run_folder", tmp_path / "small")
    pretrain_here(*words, *smaller)
    small = contrastive.load(tmp_path / "small")
    assert small.config.image.native and small.preprocess.config.patch_size == 2
    assert small.preprocess.config.most_patches == 64


REFUSED = {
    "--model.image.no_native": "data.native.patches is for native images: give --model.image.native",
    "--model.image.no_native --data.native.patches --train.micro_batch_tokens 9": "train.micro_batch_tokens is for nat",
    "--model.image.no_native --data.native.patches --data.preprocess.patches 9": "data.preprocess.patches is for nat",
    "--data.preprocess.patches 20000 --data.native.patches 4": "preprocess patches 20000: an image has 1 to 16,384",
    "--data.preprocess.patches 0": "data.preprocess.patches is 0; it must be above 0",
    "--data.preprocess.resize crop": "data.preprocess.resize crop is not for model.image.native",
    "--data.preprocess.short_side 20": "data.preprocess.short_side 20 is not for model.image.native",
    "--model.image.patch_dropout 0.5": "model.image.patch_dropout is not for native",
    "--curriculum until=0.5,image_size=8": "curriculum is not for model.image.native",
    "--train.micro_batch_tokens 64 --train.accumulate 2": "train.accumulate or train.micro_batch_tokens, not both",
    "--train.micro_batch_tokens 15": "train.micro_batch_tokens 15 is less than one image may have, 16 patches",
    "--data.native.patches 20000": "data.native.patches 20,000: use at most 16,384",
    "--data.native.patches 0": "data.native.patches is 0; it must be above 0",
    "--objectives slip": "--objectives slip cuts square views, which is not for model.image.native",
    "--objectives self_distill": "--objectives self_distill cuts square crops",
    "--objectives masked": "--objectives masked hides",
    "--objectives patch_distill": "--objectives patch_distill cuts square windows",
    "--objectives distill": "--objectives distill shows teachers square views",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_with_it_is_said_in_a_line(words, folder, tmp_path):
    with pytest.raises(UserError, match=re.escape(REFUSED[words])) as caught:
        pretrain_here("--config", folder / "native.yaml", "--run_folder", tmp_path / "run", *words.split())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_classifier_is_trained_on_native_images(folder, tmp_path, capsys):
    flags = "--data digits:train --model.image.native --data.native.patches 4 8 --train.steps 2 --batch_size 8"
    small = "--model.image.width 16 --model.image.depth 1 --model.image.num_heads 2 --model.image.mlp_dim 16"
    words = [*flags.split(), *small.split(), "--patch_size", "2", "--train.micro_batch_tokens", "16"]
    (folder / "classifier.yaml").write_text("{}")
    how = {"name": "t", "doc": "", "default_recipe": str(folder / "classifier.yaml"), "shown": ""}
    words += ["--evaluation.limit", "8", "--run_folder", str(tmp_path / "run")]
    command(TrainClassifierConfig, train_classifier, words, **how)
    assert contrastive.load(tmp_path / "run").preprocess.config.resize == "native"
    assert "native, up to 4 or 8 patches of 2 px" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="mixup mixes images of one size"):
        command(TrainClassifierConfig, train_classifier, [*words[:-1], str(tmp_path / "other"), "--mixup", "1"], **how)


def test_a_native_model_is_fine_tuned_and_stays_one(tmp_path):
    model = save_native(tmp_path / "model", patches=20)
    words = f"--data.train digits:train --data.eval digits:test --train.steps 2 --batch_size 8 --wise_ft.alphas 0 1 \
        --evaluation.limit 8 --wise_ft.eval digits:test --run_folder {tmp_path / 'run'} --init {model}"
    (tmp_path / "finetune.yaml").write_text("{}")
    how = {"name": "t", "doc": "", "default_recipe": str(tmp_path / "finetune.yaml"), "shown": ""}
    command(FinetuneConfig, finetune, words.split(), **how)
    save_native(tmp_path / "squares", native=False)
    other = words.replace(str(model), str(tmp_path / "squares")).replace(str(tmp_path / "run"), str(tmp_path / "other"))
    with pytest.raises(UserError, match="data.native.patches is for native images: of this model leave it out"):
        command(FinetuneConfig, finetune, [*other.split(), "--data.native.patches", "8"], **how)
    curve = json.loads((tmp_path / "run" / "wise_ft.json").read_text())
    assert [row["alpha"] for row in curve] == [0, 1] and "zero-shot digits:test" in curve[0]
    before, after = (contrastive.load(folder) for folder in (model, tmp_path / "run" / "encoder"))
    assert after.preprocess.config == before.preprocess.config and after.config.image.native
    images = before.preprocess([np.full((20, 90, 3), 99, np.uint8), np.full((60, 20, 3), 200, np.uint8)])
    with torch.no_grad():
        change = after.model.encode_image(images) - before.model.encode_image(images)
    assert 1e-6 < change.abs().max() < 0.5


def test_a_run_keeps_the_patches_of_the_model_it_starts_from_or_those_given(folder, tmp_path, capsys):
    model = save_native(tmp_path / "model", patches=20)
    words = ("--data", folder / "pairs.csv", "--train.steps", "1", "--train.global_batch_size", "8")
    pretrain_here("--init", model, *words, "--run_folder", tmp_path / "run")
    assert contrastive.load(tmp_path / "run").preprocess.config.most_patches == 20
    assert "native, up to 20 patches of 8 px" in " ".join(capsys.readouterr().err.split())
    given = ("--config", folder / "native.yaml", "--train.steps", "1", "--data.preprocess.patches", "30")
    pretrain_here(*given, "--run_folder", tmp_path / "given")
    assert contrastive.load(tmp_path / "given").preprocess.config.most_patches == 30


def test_a_plan_counts_the_most_patches(folder):
    def options(*words):
        return parse(PlanConfig, list(words), folder / "native.yaml", prog="t", description="")

    assert make_plan(options("--gpus", "1", "--train.micro_batch_tokens", "32")).forecasts[0].micro_batch == 2
    few, many = (
        one_pass(options("--model.text.vocab_size", "9", "--data.native.patches", n), 2, 8, False, keeps=False)
        for n in ("16", "64")
    )
    assert 3.5 < many.forward / few.forward < 6
