"""Micro-batches give the gradient of the whole batch: every parameter, dropout replayed."""

import math
from dataclasses import replace

import pytest
import torch
from rank_processes import joined, run_on_ranks

from contrastive.distributed.runtime import Runtime
from contrastive.losses import LOSSES, NonFiniteFeatures
from contrastive.losses.reference import pair_labels, sigmoid_loss, softmax_loss
from contrastive.models import DualEncoder, ImageTowerConfig, ModelConfig, PackedTokens, TextTowerConfig
from contrastive.train.gradient import Batch, forward_backward
from contrastive.train.task import seed_step

CONFIG = ModelConfig(
    embed_dim=16,
    image=ImageTowerConfig(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
    text=TextTowerConfig(vocab_size=20, context_length=6, width=16, depth=1, num_heads=2, mlp_dim=32),
    init_logit_scale=10.0,
)
PACKABLE = {"causal": True, "pool": "eos", "eos_id": 3}


def gradients(
    loss_name, accumulate, runtime, rank=0, world_size=1, broken_first=False, text=None, pack=False, **image_options
):
    torch.manual_seed(0)
    bias = -3.0 if loss_name == "sigmoid" else None
    towers = {"image": replace(CONFIG.image, **image_options), "text": replace(CONFIG.text, **(text or {}))}
    config = replace(CONFIG, **towers, init_logit_bias=bias)
    model = DualEncoder(config).double()
    wrapped = runtime.wrap(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(24, 3, 16, 16, generator=generator, dtype=torch.float64).chunk(world_size)[rank]
    tokens = torch.randint(0, 20, (24, 6), generator=generator).chunk(world_size)[rank]
    loss = LOSSES.get(loss_name)().build()
    options = {"seed": (0, 5), "runtime": runtime}
    texts = tokens.chunk(accumulate)
    if pack:
        texts = [model.text_tower.pack(part) for part in texts]
        assert all(isinstance(part, PackedTokens) and len(part.ids) < part.places.numel() * 6 for part in texts)
    if broken_first:
        broken = pixels * math.nan if rank == 1 else pixels
        with pytest.raises(NonFiniteFeatures, match="rank 1"):
            forward_backward(wrapped, loss, Batch(broken, texts, tokens[:, 0]), **options)
        assert all(p.grad is None for p in model.parameters())
    value = forward_backward(wrapped, loss, Batch(pixels, texts, tokens[:, 0]), **options)
    return value["loss"], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_name", ["sigmoid", "softmax"])
def test_micro_batches_equal_the_whole_batch(loss_name):
    runtime = Runtime("fp32")
    value, expected = gradients(loss_name, 1, runtime)
    for accumulate in (2, 3, 24):
        other_value, other = gradients(loss_name, accumulate, runtime)
        torch.testing.assert_close(other_value, value, rtol=1e-12, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("loss_name", ["sigmoid", "softmax"])
def test_several_captions_of_an_image_are_the_mean_of_steps_with_one(loss_name):
    runtime, loss = Runtime("fp32"), LOSSES.get(loss_name)().build()
    model = DualEncoder(replace(CONFIG, init_logit_bias=-3.0 if loss_name == "sigmoid" else None)).double()
    pixels, tokens = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.randint(0, 20, (12, 3, 6))

    def step(tokens, accumulate=1):
        model.zero_grad()
        texts = [part.flatten(0, -2) for part in tokens.chunk(accumulate)]
        batch = Batch(pixels, texts, tokens[..., 0])
        value = forward_backward(model, loss, batch, seed=(0, 5), runtime=runtime)
        return value["loss"], {name: p.grad for name, p in model.named_parameters()}

    each = [step(tokens[:, k]) for k in range(3)]
    for accumulate in (1, 4):
        value, grads = step(tokens, accumulate)
        torch.testing.assert_close(value, sum(one for one, _ in each) / 3, rtol=1e-12, atol=0)
        for name, grad in grads.items():
            expected = sum(one[name] for _, one in each) / 3
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("loss_name", ["sigmoid", "softmax"])
def test_captions_of_an_image_match_each_other(loss_name):
    """The loss that image and text have, between each two captions: by the full matrices, and in micro-batches."""
    runtime, loss = Runtime("fp32"), LOSSES.get(loss_name)().build()
    bias = -3.0 if loss_name == "sigmoid" else None
    model = DualEncoder(replace(CONFIG, init_logit_bias=bias)).double()
    pixels, tokens = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.randint(0, 20, (12, 3, 6))

    def step(accumulate, between):
        model.zero_grad()
        texts = [part.flatten(0, -2) for part in tokens.chunk(accumulate)]
        options = {"between": between, "seed": (0, 5), "runtime": runtime}
        value = forward_backward(model, loss, Batch(pixels, texts, tokens[..., 0]), **options)
        return value["loss"], {name: p.grad for name, p in model.named_parameters()}

    def reference(left, right):
        labels = pair_labels(torch.arange(12), "negative")
        if loss_name == "softmax":
            return softmax_loss(left, right, model.logit_scale.exp(), *labels)
        return sigmoid_loss(left, right, model.logit_scale.exp(), model.logit_bias, *labels)

    image, texts = model.encode_image(pixels), [model.encode_text(tokens[:, k]) for k in range(3)]
    each = sum(reference(image, text) for text in texts) / 3
    pairs = sum(reference(texts[a], texts[b]) for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    expected = torch.autograd.grad(each + 0.7 * pairs, list(model.parameters()))
    for accumulate in (1, 4):
        value, grads = step(accumulate, 0.7)
        torch.testing.assert_close(value, (each + 0.7 * pairs).detach(), rtol=1e-12, atol=0)
        for (name, grad), wanted in zip(grads.items(), expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-13, msg=name)
    assert step(1, 0.0)[0] == pytest.approx(each.item(), rel=1e-12)


def step_with_all_captions(loss_name, accumulate, all_captions, runtime, rank=0, world_size=1):
    torch.manual_seed(0)
    model = DualEncoder(replace(CONFIG, init_logit_bias=-3.0 if loss_name == "sigmoid" else None)).double()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 20, (12, 3, 6), generator=generator)
    images = torch.arange(12) // 11 * 7 + torch.arange(12) % 11  # the last is the image of number 7 once more
    features = model.encode_image(pixels), model.encode_text(tokens.flatten(0, 1)), model.logit_scale.exp()
    positive = images[:, None] == images.repeat_interleave(3)
    if loss_name == "softmax":
        expected = softmax_loss(*features, positive, torch.ones_like(positive))
    else:
        positive = torch.eye(12, dtype=torch.bool).repeat_interleave(3, dim=1)
        expected = sigmoid_loss(*features, model.logit_bias, positive, torch.ones_like(positive)) / 3
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    pixels, tokens = pixels.chunk(world_size)[rank], tokens.chunk(world_size)[rank]
    ids = images.chunk(world_size)[rank][:, None].expand(-1, 3)
    loss = replace(LOSSES.get(loss_name)(), duplicates="positive" if all_captions else "negative").build()
    batch = Batch(pixels, [part.flatten(0, 1) for part in tokens.chunk(accumulate)], ids)
    how = {"all_captions": all_captions, "seed": (0, 5), "runtime": runtime}
    value = forward_backward(runtime.wrap(model), loss, batch, **how)["loss"]
    for (name, parameter), right in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-8, atol=1e-12, msg=name)
    return value, expected.detach()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_all_captions_of_an_image_are_its_matches_in_one_loss(accumulate):
    """By the matrix of 12 images and 36 texts. The sigmoid loss has all of its pairs without being asked."""
    for loss_name, all_captions in (("softmax", True), ("sigmoid", False)):
        value, expected = step_with_all_captions(loss_name, accumulate, all_captions, Runtime("fp32"))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_packed_texts_give_the_same_loss_and_gradient():
    """But for rounding, as sums are taken in another order: 1e-12 here, 1e-6 of a loss in float32."""
    runtime = Runtime("fp32")
    value, expected = gradients("sigmoid", 1, runtime, text=PACKABLE)
    for accumulate in (1, 3):
        packed_value, packed = gradients("sigmoid", accumulate, runtime, text=PACKABLE, pack=True)
        torch.testing.assert_close(packed_value, value, rtol=1e-12, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(packed[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"patch_dropout": 0.5}])
def test_random_parts_are_replayed(options):
    """The gradient is that of one fixed draw: it agrees with finite differences of the accumulated loss."""
    runtime = Runtime("fp32")
    value, grads = gradients("sigmoid", 3, runtime, **options)
    again, same = gradients("sigmoid", 3, runtime, **options)
    assert torch.equal(value, again) and all(torch.equal(grads[n], same[n]) for n in grads)

    def shifted(name, index, by):
        original = DualEncoder.__init__

        def init(self, config):
            original(self, config)
            with torch.no_grad():
                dict(self.named_parameters())[name].view(-1)[index] += by

        DualEncoder.__init__ = init
        try:
            return gradients("sigmoid", 3, runtime, **options)[0]
        finally:
            DualEncoder.__init__ = original

    for name, index in (("image_tower.transformer.blocks.0.mlp.fc1.weight", 3), ("logit_bias", 0), ("logit_scale", 0)):
        slope = (shifted(name, index, 1e-4) - shifted(name, index, -1e-4)) / 2e-4
        # The shift is added in float32, before the model is made double: 1e-4 is met to about 1e-3 of itself.
        torch.testing.assert_close(slope, grads[name].view(-1)[index], rtol=5e-3, atol=1e-6)


def run_rank(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    assert (runtime.rank, runtime.world_size) == (rank, world_size)
    cases = [(1, False), (3, False), (1, True), (3, True)]
    results = [gradients("sigmoid", k, runtime, rank, world_size, broken) for k, broken in cases]
    results.append(gradients("sigmoid", 3, runtime, rank, world_size, text=PACKABLE, pack=True))
    torch.save(results, f"{folder}/rank{rank}.pt")
    runtime.close()


def test_micro_batches_on_two_ranks_equal_one_process(tmp_path, free_port):
    """Also after a step that both ranks left because one of them had features that are not finite."""
    run_on_ranks(2, run_rank, 2, free_port, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    plain, of_packable = (gradients("sigmoid", 1, Runtime("fp32"), text=text) for text in (None, PACKABLE))
    for case, (value, expected) in enumerate([plain] * 4 + [of_packable]):
        losses = torch.stack([results[case][0] for results in ranks])
        torch.testing.assert_close(losses.mean(), value, rtol=1e-10, atol=0)
        for results in ranks:
            for name, gradient in expected.items():
                torch.testing.assert_close(results[case][1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def run_rank_with_all_captions(rank, world_size, port, folder):
    runtime = joined(rank, world_size, port)
    values = [step_with_all_captions("softmax", k, True, runtime, rank, world_size) for k in (1, 2)]
    torch.save(values, f"{folder}/rank{rank}.pt")
    runtime.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_captions_on_ranks_equal_the_formula(ranks, tmp_path, free_port):
    run_on_ranks(ranks, run_rank_with_all_captions, ranks, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case in range(2):
        value = sum(result[case][0] for result in results) / ranks
        torch.testing.assert_close(value, results[0][case][1], rtol=1e-10, atol=0)


def test_random_numbers_are_a_function_of_the_place():
    draws = set()
    for place in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1), (0, 1, 0, 1)):
        seed_step(*place)
        first = torch.rand(1).item()
        seed_step(*place)
        assert torch.rand(1).item() == first
        draws.add(first)
    assert len(draws) == 5
