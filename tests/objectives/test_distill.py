"""Teachers in a run: the formula under ranks and micro-batches, live and stored ones alike, never saved, checked."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from evaluate.small_model import save_small_model
from launching import pretrain_here
from rank_processes import joined, run_on_ranks
from safetensors.torch import load_file

import contrastive
from contrastive.commands.embed_command import main as embed
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.losses import SoftmaxLoss, reference
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.objectives import Setting
from contrastive.objectives.distill import DistillConfig
from contrastive.objectives.learner import Learner
from contrastive.train.gradient import Batch, forward_backward

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
)
B, K = 12, 2
DISTILL = {"weight": 3.0, "scale": (20.0, 5.0), "feature_weight": 0.7, "project": True}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return tuple(str(save_small_model(folder / str(seed), seed=seed)) for seed in range(2))


def learner(teachers, **options):
    torch.manual_seed(0)
    model = Learner(CONFIG)
    setting = Setting("distill", CONFIG, None, None, Preprocess(PreprocessConfig(image_size=16)), 10, (16,))
    model.objectives["distill"] = DistillConfig(teacher=teachers, **{**DISTILL, **options}).build(setting)
    for one in model.objectives["distill"].teachers:
        one.model.double()
    return model.double()


def data():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (B, K, 6), generator=generator)
    inputs = {}
    for k in range(2):
        inputs[f"{k}.image"] = torch.randint(0, 256, (B, 3, 16, 16), generator=generator, dtype=torch.uint8)
        inputs[f"{k}.tokens"] = torch.randint(0, 200, (B, K, 12), generator=generator)
    return pixels, tokens, inputs


def gradients(teachers, accumulate, runtime, rank=0, world_size=1):
    model = learner(teachers)
    wrapped = runtime.wrap(model)
    pixels, tokens, inputs = data()
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    inputs = {name: value.chunk(world_size)[rank] for name, value in inputs.items()}
    texts = [part.flatten(0, 1) for part in tokens.chunk(accumulate)]
    batch = Batch(pixels, texts, tokens[..., 0], {"distill": inputs})
    how = {"objectives": model.active(0), "seed": (0, 5), "runtime": runtime}
    return forward_backward(wrapped, SoftmaxLoss(), batch, **how), {n: p.grad for n, p in model.named_parameters()}


def check(teachers, losses, grads):
    """Compare with the formulas on the whole batch."""
    model = learner(teachers)
    distill, (pixels, tokens, inputs) = model.objectives["distill"], data()
    image, scale = model.encode_image(pixels), model.logit_scale.exp()
    texts = model.encode_text(tokens.flatten(0, 1)).unflatten(0, (B, K))
    taught, distances = [], []
    for k, teacher in enumerate(distill.teachers):
        with torch.no_grad():
            theirs = teacher.model.encode_image(teacher.preprocess.normalize(inputs[f"{k}.image"]).double())
            said = teacher.model.encode_text(inputs[f"{k}.tokens"].flatten(0, 1)).unflatten(0, (B, K))
        taught.append((theirs, said))
        heads = distill.heads[k]
        distances.append((1 - F.normalize(heads["image"](image), dim=-1).mul(theirs).sum(-1)).mean())
        distances.append((1 - F.normalize(heads["text"](texts), dim=-1).mul(said).sum(-1)).mean())
    contrastive_loss, affinity = 0, 0
    for c in range(K):
        whole = torch.eye(B, dtype=torch.bool), torch.ones(B, B, dtype=torch.bool)
        contrastive_loss += reference.softmax_loss(image, texts[:, c], scale, *whole) / K
        of_caption = [(theirs, said[:, c], s) for (theirs, said), s in zip(taught, (20.0, 5.0), strict=True)]
        affinity += reference.affinity_loss(image, texts[:, c], scale, of_caption) / K
    own = affinity + 0.7 * sum(distances) / 4
    loss = contrastive_loss + 3 * own
    torch.testing.assert_close(losses["loss"], loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["distill_loss"], own.detach(), rtol=1e-9, atol=0)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert len(expected) == len(grads)
    for (name, grad), want in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_micro_batches_equal_the_formula(teachers, accumulate):
    check(teachers, *gradients(teachers, accumulate, Runtime("fp32")))


def run_rank(rank, world_size, port, folder, teachers):
    runtime = joined(rank, world_size, port)
    torch.save([gradients(teachers, k, runtime, rank, world_size) for k in (1, 2)], f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_formula(teachers, ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path), teachers)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case in (0, 1):
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(teachers, losses, results[0][case][1])


# Runs

TINY = """
model:
  embed_dim: 16
  image: {image_size: 16, patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
  text: {context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 32}
data: {train: "pairs.csv", vocab_size: 300, AUGMENT}
train: {steps: 4, global_batch_size: 8}
checkpoint: {every: 2}
"""
CUT = "augment: {crop_scale: [0.3, 0.8], flip: true, gray_prob: 0.3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of 16 pictures with two captions each, and recipes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    lines = ["image,caption"]
    for i in range(16):
        picture = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8).repeat_interleave(6, 0)
        Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
        lines += [f"{i}.png,Number {i}!", f'{i}.png,"the  {i}th, again"']
    (folder / "pairs.csv").write_text("\n".join(lines))
    for name, augment in (("cut", CUT), ("whole", "augment: {crop_scale: [1.0, 1.0]}")):
        text = TINY.replace("AUGMENT", augment).replace("pairs.csv", str(folder / "pairs.csv"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def stored(folder, teachers):
    """The first teacher's views for each recipe."""
    for name in ("cut", "whole"):
        flags = ["--views", "3", "--augment", str(folder / f"{name}.yaml"), "--device", "cpu"]
        embed([teachers[0], str(folder / "pairs.csv"), str(folder / f"stored-{name}"), *flags])
    return {name: str(folder / f"stored-{name}") for name in ("cut", "whole")}


def train(run, recipe, *words):
    pretrain_here("--run_folder", run, *(("--config", recipe) if recipe else ()), *words)
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]


def taught_by(*teachers):
    return "--objectives", "distill", "--objectives.distill.teacher", *teachers


def test_stored_teachers_give_the_losses_of_live_ones(folder, teachers, stored, tmp_path):
    """Of whole images, where every view is the same."""
    options = "--data.captions_per_image", 2
    live, kept = (
        train(tmp_path / name, folder / "whole.yaml", *taught_by(teacher), *options)
        for name, teacher in (("live", teachers[0]), ("stored", stored["whole"]))
    )
    assert live[-1]["distill_loss"] > 0.01
    for ours, theirs in zip(kept, live, strict=True):
        for name in ("loss", "distill_loss", "contrastive_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_stored_view_is_what_its_embedding_is_of(folder, teachers, stored, tmp_path):
    """The live teacher sees the views that the stored one has drawn: the ensemble of both is either alone."""
    both = train(tmp_path / "both", folder / "cut.yaml", *taught_by(stored["cut"], teachers[0]))
    alone = train(tmp_path / "alone", folder / "cut.yaml", *taught_by(stored["cut"]))
    other = train(tmp_path / "other", folder / "cut.yaml", *taught_by(teachers[0]))
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert [row["loss"] for row in other] != pytest.approx([row["loss"] for row in alone], rel=1e-3)


def test_what_is_saved_and_how_a_run_goes_on(folder, teachers, tmp_path):
    moved = shutil.copytree(teachers[0], tmp_path / "moved")
    words = *taught_by(teachers[0]), "--objectives.distill.feature_weight", 1, "--objectives.distill.project"
    whole = train(tmp_path / "run", folder / "cut.yaml", *words, "--train.ema_decay", 0.9)
    final, checkpoint = tmp_path / "run/final", tmp_path / "run/checkpoints/step-00000002"
    assert not (final / "objectives").exists() and contrastive.load(final).config.embed_dim == 16
    kept = load_file(checkpoint / "objectives/model.safetensors")
    heads = {f"objectives.distill.heads.0.{side}.{kind}" for side in ("image", "text") for kind in ("weight", "bias")}
    assert kept.keys() == heads | {"objectives.distill._extra_state"}

    for name in ("checkpoints/step-00000004", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    with pytest.raises(UserError, match=r"the teachers of objectives\.distill are not those .* with --objectives\.dis"):
        train(tmp_path / "run", None, "--resume", *taught_by(teachers[1]))
    resumed = train(tmp_path / "again", None, "--resume", *taught_by(moved))
    assert [row["loss"] for row in resumed[-2:]] == [row["loss"] for row in whole[-2:]]


def no_text_tower(folder):
    from contrastive.data.preprocess import PreprocessConfig
    from contrastive.files import write_folder
    from contrastive.interop.bundle import save_model
    from contrastive.models import ClassifierConfig, ImageClassifier

    image = replace(ClassifierConfig().image, image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16)
    config = ClassifierConfig(image=image, num_classes=3)
    weights = ImageClassifier(config).state_dict()
    out = folder / "classifier"
    if not out.exists():
        write_folder(out, lambda to: save_model(to, weights, config, PreprocessConfig(image_size=16)))
    return str(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--objectives", "distill"), "objectives.distill has no teacher: give --objectives.distill.teacher MODEL"),
        (taught_by("/nowhere"), "no model at /nowhere"),
        (taught_by("CLASSIFIER"), "classifier has no text tower: a teacher compares images with texts"),
        (taught_by("TEACHER", "--objectives.distill.scale", "2", "3"), r"scale has 2 numbers for 1 teachers"),
        (taught_by("TEACHER", "--objectives.distill.project"), r"project is for objectives.distill.feature_weight"),
        (
            taught_by("TEACHER", "--objectives.distill.feature_weight", "1"),
            "has 32 channels, the model 16: .* needs a linear layer between them, --objectives.distill.project",
        ),
        (
            taught_by("WHOLE"),
            r"data.augment.crop_scale is \(0.3, 0.8\), but the views of .* were drawn with \(1.0, 1.0\)",
        ),
        (taught_by("CUT", "--data.caption_templates", "a {}"), "holds embeddings of captions as they are"),
        (taught_by("CUT", "--data.train", "digits:test"), "digits:test is learned by prompts of its classes"),
        (taught_by("CUT", "--data.train", "scenes:val"), "holds a teacher's embeddings of other data"),
    ],
)
def test_bad_input_is_told_before_training(folder, teachers, stored, tmp_path, words, message):
    places = {"TEACHER": teachers[0], "WHOLE": stored["whole"], "CUT": stored["cut"]}
    words = [no_text_tower(folder) if word == "CLASSIFIER" else places.get(word, word) for word in words]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", folder / "cut.yaml", *words)
    assert not (tmp_path / "run").exists()
