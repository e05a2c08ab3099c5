"""Captions as an objective: the formula on ranks and in micro-batches, what is drawn, resume, and reading it back."""

import shutil

import numpy as np
import pytest
import torch
from rank_processes import joined, run_on_ranks
from safetensors.torch import load_file

import contrastive
from contrastive.data.extras import DrawnSample
from contrastive.data.order import Order
from contrastive.data.samples import PairDataset
from contrastive.data.settings import DataConfig
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.log import read_metrics
from contrastive.losses import SigmoidLoss
from contrastive.losses.reference import caption_loss, pair_labels, sigmoid_loss
from contrastive.models import DualEncoder, ImageModel, ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.models.generate import GenerationConfig, generate
from contrastive.objectives import Setting
from contrastive.objectives.caption import CaptionConfig, CaptionRows
from contrastive.objectives.captioner import load_captioner
from contrastive.objectives.learner import ImageLearner, Learner
from contrastive.train.gradient import Batch, forward_backward
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.run import command

TEXTS = ["a red star", "two rings", "a big green heart on a striped background", "star", "blue ring", "a b c d e f"]
B, K = 12, 2
SETTINGS = ["--objectives", "caption", "--train.accumulate", "2", "--train.ema_decay", "0.9", "--checkpoint.keep", "9"]


def setting(config, tokenizer):
    return Setting("caption", config, None, tokenizer, None, 10, (16,), captions_per_image=K)


def learner(kind=Learner):
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXTS, 300, 16)
    text = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "width": 16, "num_heads": 2, "mlp_dim": 32}
    image = {"image_size": 16, "patch_size": 4, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    config = ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(width=24, projection=True, **image),
        text=TextTowerConfig(depth=3, pool="average", pad_id=tokenizer.pad_id, **text),
        init_logit_scale=10.0,
        init_logit_bias=-3.0,
    )
    model = kind(config)
    model.objectives["caption"] = CaptionConfig(weight=2.0).build(setting(config, tokenizer))
    return model.double(), tokenizer


def data(tokenizer):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    order = torch.randint(len(TEXTS), (B, K), generator=generator)
    tokens = tokenizer([TEXTS[place] for place in order.flatten().tolist()]).unflatten(0, (B, K))
    return pixels, tokens, order, torch.rand(B, K, generator=generator) < 0.5


def gradients(accumulate, runtime, rank=0, world_size=1, kind=Learner):
    model, tokenizer = learner(kind)
    wrapped = runtime.wrap(model)
    pixels, tokens, order, parallel = (part.chunk(world_size)[rank] for part in data(tokenizer))
    inputs = {"caption": model.objectives["caption"].inputs({}, {"ids": tokens, "parallel": parallel})}
    texts = [part.flatten(0, 1) for part in tokens.chunk(accumulate)]
    how = {"objectives": model.active(0), "seed": (0, 5), "runtime": runtime}
    loss = SigmoidLoss() if kind is Learner else None
    losses = forward_backward(wrapped, loss, Batch(pixels, texts, order, inputs), **how)
    return losses, {name: p.grad for name, p in model.named_parameters()}


def check(losses, grads, kind=Learner):
    model, tokenizer = learner(kind)
    pixels, tokens, order, parallel = data(tokenizer)
    decoder = model.objectives["caption"].decoder
    assert len(decoder.transformer.blocks) == 2 and decoder.config.mlp_dim == 32
    patches = model.image_tower.forward_features(pixels).repeat_interleave(K, dim=0)
    ids = tokens.flatten(0, 1)[:, 1:]
    told = caption_loss(decoder.logits(decoder(patches, ids, parallel.flatten())), ids, tokenizer.eos_id)
    wanted = {"loss": 2 * told, "caption_loss": told}
    if kind is Learner:
        image, scale = model.encode_image(pixels), (model.logit_scale.exp(), model.logit_bias)
        labels = (pair_labels(ids, "negative") for ids in order.T)
        texts = [model.encode_text(of) for of in tokens.unbind(1)]
        each = [sigmoid_loss(image, text, *scale, *own) for text, own in zip(texts, labels, strict=True)]
        contrastive = sum(each) / K
        wanted |= {"loss": contrastive + 2 * told, "contrastive_loss": contrastive}
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-6, atol=0)
    expected = torch.autograd.grad(wanted["loss"], list(model.parameters()), allow_unused=kind is not Learner)
    for (name, grad), want in zip(grads.items(), expected, strict=True):
        if want is None:  # the pooling, which captions do not train
            assert name.startswith(("image_tower.head.", "image_tower.projection.")) and (
                grad is None or not grad.any()
            )
            continue
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-8, msg=name)  # the weights of tokens are float32


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("kind", [Learner, ImageLearner])
def test_loss_and_gradients_are_the_formulas(kind, accumulate):
    check(*gradients(accumulate, Runtime("fp32"), kind=kind), kind=kind)


def run_rank(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    cases = [(kind, k) for kind in (Learner, ImageLearner) for k in (1, 2)]
    results = [gradients(k, runtime, rank, world_size, kind) for kind, k in cases]
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_the_formula(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case, kind in enumerate((Learner, Learner, ImageLearner, ImageLearner)):
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(losses, results[0][case][1], kind)


def test_what_is_told_is_the_caption_without_dropout_of_tokens():
    """Tokens that only the text tower is spared are told all the same, in a share of captions all at once."""
    source, tokenizer = open_source("scenes:val"), train_bpe(TEXTS, 300, 90)
    order = Order(len(source), 64, 3)
    extra = CaptionRows("caption", 0, tokenizer, 0.25)
    rows = PairDataset(source, order, tokenizer, 16, DataConfig().augment, ("{} !",), 2, 0.5, [extra])
    samples = [rows[position] for position in range(300)]
    assert all(sample["caption.ids"].shape == (2, 90) for sample in samples)
    said = [tokenizer.decode(sample["caption.ids"][0]) for sample in samples[:30]]
    for sample, text in zip(samples, said, strict=False):
        assert text.removesuffix(" !") in [one.lower() for one in source.captions(sample["index"])]
    parallel = np.stack([sample["caption.parallel"] for sample in samples])
    assert parallel.dtype == bool and abs(parallel.mean() - 0.25) < 0.06
    assert (rows[7]["caption.parallel"] == parallel[7]).all()
    sure = DrawnSample(None, 0, ("a",) * 50, np.random.default_rng(0), 16, None)
    assert not CaptionRows("caption", 0, tokenizer, 0.0).of(sure)["parallel"].any()
    assert CaptionRows("caption", 0, tokenizer, 1.0).of(sure)["parallel"].all()
    hidden = CaptionRows("caption", 0, tokenizer, 0.25, 0.4).of(sure)["hidden"]
    assert hidden.shape == (50, 90) and abs(hidden.mean() - 0.4) < 0.05


def train(folder, file, *words):
    words = ["--config", str(file), "--run_folder", str(folder), *map(str, words)]
    command(PretrainConfig, pretrain, words, name="t", doc="", default_recipe=str(file), shown="")


@pytest.fixture(scope="module")
def caption_run(tmp_path_factory, tiny_text):
    folder = tmp_path_factory.mktemp("caption")
    (folder / "tiny.yaml").write_text(tiny_text)
    train(folder / "run", folder / "tiny.yaml", *SETTINGS)
    return folder / "run"


def test_a_run_resumes_exactly(caption_run, tmp_path):
    shutil.copytree(caption_run, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    shutil.rmtree(tmp_path / "run/final")
    train(tmp_path / "run", caption_run.parent / "tiny.yaml", "--resume")
    losses = [[row["caption_loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
              for run in (caption_run, tmp_path / "run")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 8
    for name in ("model", "objectives/model", "objectives/ema", "optimizer"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "run" / file), load_file(caption_run / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_the_decoder_is_read_back(caption_run, tmp_path, capsys):
    newest = caption_run / "checkpoints/step-00000008"
    averaged = load_file(newest / "objectives/ema.safetensors")
    for place in (newest, caption_run):  # of the run, whose final model kept none, it is the newest checkpoint
        captioner = load_captioner(place)
        assert captioner.bundle.path == newest and not captioner.decoder.training
        assert torch.equal(captioner.decoder.start, averaged["objectives.caption.decoder.start"])
    assert "final has no caption decoder" in capsys.readouterr().err
    kept = ["--objectives.caption.keep", "--train.steps", 1, "--objectives.caption.width", 8]
    train(tmp_path / "run", caption_run.parent / "tiny.yaml", *SETTINGS, *kept, "--objectives.caption.num_heads", 2)
    captioner = load_captioner(tmp_path / "run")
    assert captioner.bundle.path == tmp_path / "run/final" and captioner.decoder.config.width == 8
    pixels = torch.randn(2, 3, 16, 16)
    assert captioner.decoder(captioner.patches(pixels), torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 8)


def test_a_model_without_a_decoder_says_how_to_have_one(caption_run):
    with pytest.raises(UserError, match="final has no caption decoder: train with --objectives caption, and keep it"):
        load_captioner(caption_run / "final")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--objectives.caption.parallel_share 1.5", "parallel_share is 1.5; it must be from 0 to 1"),
        ("--objectives.caption.width 12 --objectives.caption.num_heads 5", "width 12 is not a multiple of"),
    ],
)
def test_wrong_options_are_one_line(words, said, tiny, tmp_path):
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", tiny, *SETTINGS, *words.split())
    assert said in str(error.value) and "\n" not in str(error.value)


ALONE = ["--loss", "none", "--model.image.pool", "average", *SETTINGS]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_text):
    """A run of captions alone, as CapPa's."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.yaml").write_text(tiny_text + "loss: {duplicates: positive}\n")  # of another loss: left aside
    train(folder / "run", folder / "tiny.yaml", *ALONE)
    return folder / "run"


def test_captions_alone_give_an_image_model(alone):
    rows = read_metrics(alone / "metrics.jsonl")
    assert all(row["loss"] == row["caption_loss"] for row in rows if row["kind"] == "train")
    assert all("contrastive_loss" not in row and "logit_scale" not in row for row in rows)
    (last,) = [row for row in rows if row["kind"] == "eval" and row["step"] == 8]
    assert 0 <= last["captions/digits:test/named"] <= 100
    bundle = contrastive.load(alone)
    assert isinstance(bundle.model, ImageModel) and bundle.tokenizer is None
    weights = load_file(alone / "final/model.safetensors")
    assert all(name.startswith("image_tower.") for name in weights) and not (alone / "final/objectives").exists()
    assert bundle.model.encode_image(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    encoder = contrastive.load_image_encoder(alone)
    assert encoder(torch.randn(1, 3, 16, 16)).shape == (1, 4, 16)
    captioner = load_captioner(alone)
    ids, _ = generate(captioner.decoder, captioner.patches(torch.randn(2, 3, 16, 16)), GenerationConfig())
    assert all(isinstance(captioner.tokenizer.decode(row), str) for row in ids)


def test_captions_alone_resume_exactly(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    shutil.rmtree(tmp_path / "run/final")
    train(tmp_path / "run", alone.parent / "tiny.yaml", "--resume")
    for name in ("model", "objectives/model", "optimizer"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "run" / file), load_file(alone / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_the_image_model_starts_another_run(alone, tmp_path):
    file = alone.parent / "tiny.yaml"
    train(tmp_path / "run", file, "--init_image", alone, "--train.steps", 1, "--data.eval", "digits:test")
    assert isinstance(contrastive.load(tmp_path / "run").model, DualEncoder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--loss none --objectives none", "--loss none learns by objectives alone, one of which starts at 0"),
        ("--loss none --objectives.caption.start 0.5", "--loss none learns by objectives alone, one of which starts"),
        ("--loss none --objectives patch_mean", "--objectives patch_mean aims at what the contrastive loss teaches"),
        ("--loss none", "model.image.pool attention: nothing trains it with --loss none"),
        ("--loss none --model.image.pool average --model.image.projection", "model.image.projection true: nothing"),
        (
            "--loss none --model.image.pool average --model.text.causal",
            "model.text.causal has no effect with loss.name",
        ),
        ("--loss none --objectives masked --model.image.pool average", "data.eval is scored by captions with --loss"),
        ("--loss none --init nowhere", "--loss none has no text tower to start: use --init_image"),
    ],
)
def test_what_a_run_without_a_loss_cannot_have(words, said, tiny, tmp_path):
    test_wrong_options_are_one_line(words, said, tiny, tmp_path)
