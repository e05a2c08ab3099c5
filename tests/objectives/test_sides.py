"""Two views of an image against their formulas, under ranks and micro-batches."""

import math
import os
from dataclasses import replace

import pytest
import torch
from rank_processes import run_on_ranks

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.losses import SigmoidLoss, SoftmaxLoss
from contrastive.losses import reference as formulas
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.objectives import Setting
from contrastive.objectives.learner import Learner
from contrastive.objectives.slip import SlipConfig
from contrastive.train.gradient import Batch, forward_backward

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
)
B = 12
PREPROCESS = Preprocess(PreprocessConfig(image_size=16))
IMAGES = torch.arange(B) % 11  # the last is the first once more
KINDS = ("softmax", "sigmoid")


def setting(name, locked=False):
    return Setting(name, CONFIG, None, None, PREPROCESS, 10, (16,), B, locked=locked)


def learner(kind):
    torch.manual_seed(0)
    model = Learner(replace(CONFIG, init_logit_bias=-3.0 if kind == "sigmoid" else None))
    model.objectives["slip"] = SlipConfig(loss=kind, hidden=16, out=8, temperature=0.2).build(setting("slip"))
    return model.double()


def data():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(B, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (B, 6), generator=generator)
    views = torch.randint(0, 256, (B, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return pixels, tokens, {"slip": {"views": views, "image": IMAGES}}


def gradients(kind, accumulate, runtime, rank=0, world_size=1):
    model = learner(kind)
    pixels, tokens, inputs = data()
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    inputs = {name: {k: v.chunk(world_size)[rank] for k, v in own.items()} for name, own in inputs.items()}
    batch = Batch(pixels, tokens.chunk(accumulate), tokens[:, 0], inputs)
    how = {"objectives": model.active(0), "seed": (0, 5), "runtime": runtime}
    loss = SigmoidLoss() if kind == "sigmoid" else SoftmaxLoss()
    losses = forward_backward(runtime.wrap(model), loss, batch, **how)
    return losses, {name: p.grad for name, p in model.named_parameters()}


def contrastive(kind, image, text, model, positive, counted):
    if kind == "softmax":
        return formulas.softmax_loss(image, text, model.logit_scale.exp(), positive, counted)
    return formulas.sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias, positive, counted)


def wanted(kind):
    """The losses by their formulas, and the gradients."""
    model = learner(kind)
    pixels, tokens, inputs = data()
    slip = model.objectives["slip"]

    def told(view):
        seen = model.image_tower(PREPROCESS.normalize(view).double(), project=False)
        return torch.nn.functional.normalize(slip.head(seen), dim=1)

    views = torch.cat([told(inputs["slip"]["views"][:, side]) for side in (0, 1)])
    own = torch.arange(2 * B).roll(B)[:, None] == torch.arange(2 * B)  # which two are a pair
    same = IMAGES.repeat(2)[:, None] == IMAGES.repeat(2)
    logits = (5 * views @ views.T).masked_fill(same & ~own, -torch.inf)
    if kind == "softmax":
        of_views = torch.nn.functional.cross_entropy(logits, torch.arange(2 * B).roll(B))
    else:
        of_views = formulas.sigmoid_loss(views, views, 5, -math.log(2 * B - 2), own, own | ~same)
    features = model.encode_image(pixels), model.encode_text(tokens)
    loss = contrastive(kind, *features, model, *formulas.pair_labels(tokens[:, 0], "negative")) + of_views
    losses = {"loss": loss, "slip_loss": of_views}
    names, parameters = zip(*model.named_parameters(), strict=True)
    return losses, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def check(kind, losses, grads):
    right, expected = wanted(kind)
    for name, value in right.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-9, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_their_formulas(kind, accumulate):
    check(kind, *gradients(kind, accumulate, Runtime("fp32")))


def test_of_different_images_it_is_the_loss_of_simclr():
    first, second = torch.nn.functional.normalize(torch.randn(2, 7, 5).double(), dim=2)
    slip = SlipConfig(temperature=0.2).build(setting("slip"))
    loss = slip.loss_of_batch(None, {"first": first, "second": second}, {"image": torch.arange(7)})
    torch.testing.assert_close(loss, formulas.view_loss(first, second, 0.2), rtol=1e-12, atol=0)


def run_rank(rank, world_size, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    runtime = Runtime("fp32")
    results = {(kind, k): gradients(kind, k, runtime, rank, world_size) for kind in KINDS for k in (1, 2)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_formulas(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case, (_, grads) in results[0].items():
        losses = {name: sum(r[case][0][name] for r in results) / ranks for name in results[0][case][0]}
        check(case[0], losses, grads)


def test_a_locked_tower_learns_no_views():
    with pytest.raises(UserError, match="--objectives slip trains the image tower, which --lock image keeps as it is"):
        SlipConfig().build(setting("slip", locked=True))
