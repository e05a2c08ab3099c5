"""The caption decoder: its blocks against torch's, what each position sees, its loss against the formula."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from contrastive.errors import UserError
from contrastive.losses import reference
from contrastive.models import TextTowerConfig, caption_decoder
from contrastive.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig, token_losses
from contrastive.train.counting import Allocations

CONFIG = CaptionDecoderConfig(width=16, depth=2, num_heads=4, mlp_dim=24)
BOS, EOS, VOCABULARY, LENGTH = 1, 2, 23, 9
ROWS = torch.tensor(
    [
        [1, 7, 8, 2, 0, 0, 0, 0, 0],
        [1, 2, 0, 0, 0, 0, 0, 0, 0],  # no word
        [1, 9, 8, 7, 6, 5, 4, 3, 2],  # full
        [1, 6, 5, 2, 9, 9, 2, 0, 0],  # tokens behind the end
        [1, 6, 5, 4, 0, 0, 0, 0, 0],  # no end
    ]
)
PARALLEL = torch.tensor([True, False, True, False, False])


def decoder(image_width=12, bos_id=BOS, context_length=LENGTH, **changes):
    torch.manual_seed(0)
    how = {"vocab_size": VOCABULARY, "context_length": context_length, "eos_id": EOS, "bos_id": bos_id}
    made = CaptionDecoder(replace(CONFIG, **changes), image_width, **how).double()
    for parameter in made.parameters():  # biases and norms too, which begin alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def images(count=5, width=12):
    return torch.randn(count, 5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def told(model, image, rows, parallel):
    ids = model.ids(rows)
    return model.loss(image, ids, model.weights(ids), parallel)


def test_blocks_are_torchs_pre_norm_decoder_layers():
    ours, image = decoder(image_width=16), images(width=16)
    x = ours.inputs(ours.ids(ROWS)) + ours.position_embedding
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH - 1, dtype=torch.float64)
    for block in ours.transformer.blocks:
        layer = nn.TransformerDecoderLayer(
            16, 4, 24, 0.0, lambda x: nn.functional.gelu(x, approximate="tanh"), 1e-6, True, norm_first=True
        ).double()
        for theirs, own in (("self_attn", block.attention), ("multihead_attn", block.image_attention)):
            theirs = getattr(layer, theirs)
            parts = (own.q_proj, own.k_proj, own.v_proj)
            theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
            theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
            theirs.out_proj = own.out_proj
        layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
        layer.norm1, layer.norm2, layer.norm3 = block.norm1, block.image_norm, block.norm2
        x = layer(x, image, tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(ours(image, ours.ids(ROWS)), ours.norm(x))


@pytest.mark.parametrize("image_width", [12, 16])
@pytest.mark.parametrize("logits_at_once", [1, 3 * VOCABULARY, 10**6])
def test_loss_and_gradients_are_the_formulas(image_width, logits_at_once, monkeypatch):
    monkeypatch.setattr(caption_decoder, "CPU_LOGITS", logits_at_once)
    found, expected = [], []
    for results in (found, expected):
        model, image = decoder(image_width), images(width=image_width).requires_grad_()
        if results is found:
            loss = told(model, image, ROWS, PARALLEL)
        else:
            ids = ROWS[:, 1:]
            loss = reference.caption_loss(model.logits(model(image, ids, PARALLEL)), ids, EOS)
        loss.backward()
        results += [loss.detach(), image.grad, *(p.grad for p in model.parameters())]
    assert all(gradient is not None for gradient in found)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # the weights of tokens are float32


def test_several_captions_of_an_image_and_what_only_fills_up():
    model, image, rows, parallel = decoder(), images(13), ROWS.repeat(13, 1), PARALLEL.repeat(13)
    each = image.repeat_interleave(5, dim=0)
    expected = reference.caption_loss(model.logits(model(each, rows[:, 1:], parallel)), rows[:, 1:], EOS)
    torch.testing.assert_close(told(model, image, rows, parallel), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(told(model, each, rows, parallel), expected, rtol=1e-6, atol=0)


def test_weights_reach_to_the_longest_caption():
    model = decoder(context_length=40)
    rows = torch.nn.functional.pad(ROWS[[0, 3, 1]], (0, 31))
    weights = model.weights(model.ids(rows))
    third = 1 / 3
    expected = [[third] * 3 + [0] * 5, [third] * 3 + [0] * 5, [1] + [0] * 7]
    assert weights.tolist() == [pytest.approx(row) for row in expected]


def test_each_kind_of_caption_sees_what_it_may():
    model, image = decoder(), images()
    ids = model.ids(ROWS)
    states = model(image, ids, PARALLEL)
    changed = ids.clone()
    changed[:, 4] = 11
    after = model(image, changed, PARALLEL)
    torch.testing.assert_close(after[:, :5], states[:, :5])
    assert not torch.isclose(after[~PARALLEL, 5], states[~PARALLEL, 5]).all(dim=-1).any()
    torch.testing.assert_close(after[PARALLEL], states[PARALLEL])
    # In parallel every position sees all others, and both kinds the image.
    model.position_embedding.data[-1] *= -9  # no shift, which norms take away
    assert not torch.isclose(model(image, ids, PARALLEL)[PARALLEL, 0], states[PARALLEL, 0]).all(dim=-1).any()
    assert not torch.isclose(model(image.flip(0), ids, PARALLEL), states).all(dim=-1).any(dim=1)[[0, 1, 3, 4]].any()


def test_both_kinds_in_one_batch_are_each_alone():
    model, image, ids = decoder(), images(), ROWS[:, 1:]
    states = model(image, ids, PARALLEL)
    for kind in (PARALLEL, ~PARALLEL):
        torch.testing.assert_close(model(image[kind], ids[kind], PARALLEL[kind]), states[kind])
    torch.testing.assert_close(model(image[~PARALLEL], ids[~PARALLEL]), states[~PARALLEL])


def test_a_hidden_token_is_not_seen_by_those_after_it():
    model, image, ids = decoder(), images(), ROWS[:, 1:]
    hidden = torch.zeros(ids.shape, dtype=torch.bool)
    torch.testing.assert_close(model(image, ids, hidden=hidden), model(image, ids))
    hidden[:, 4] = True
    states = model(image, ids, hidden=hidden)
    changed = ids.clone()
    changed[:, 4] = 11
    torch.testing.assert_close(model(image, changed, hidden=hidden), states)
    changed[:, 3] = 12
    assert not torch.isclose(model(image, changed, hidden=hidden)[:, 4:], states[:, 4:]).all(dim=-1).any()


def test_a_tokenizer_without_bos_has_its_first_token_told():
    assert torch.equal(decoder(bos_id=None).ids(ROWS), ROWS)
    assert decoder(bos_id=None).max_tokens == LENGTH and decoder().max_tokens == LENGTH - 1
    with pytest.raises(UserError, match="9 tokens per caption, but the decoder's captions have 8"):
        decoder().ids(torch.ones(1, 10, dtype=torch.int64))


def test_compiled_and_recomputed_blocks_give_the_same(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="aot_eager"))
    results = []
    for changed in (False, True):
        model, image = decoder(), images().requires_grad_()
        if changed:
            model.transformer.compile_blocks()
            model.transformer.gradient_checkpointing = 0.5
        model.transformer.mean_squares = []
        loss = told(model, image, ROWS, PARALLEL)
        loss.backward()
        assert len(model.transformer.mean_squares) == 2
        results.append([loss.detach(), image.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_sizes_are_the_text_towers_with_half_the_depth():
    text = TextTowerConfig(width=32, depth=5, num_heads=2, mlp_dim=48)
    config = CaptionDecoderConfig(num_heads=8).like(text)
    assert (config.width, config.depth, config.num_heads, config.mlp_dim) == (32, 3, 8, 48)
    with pytest.raises(UserError, match="objectives.caption.width 32 is not a multiple of objectives.caption.num_head"):
        decoder(width=32, num_heads=5)


@pytest.mark.parametrize("device_type", [None, "cpu"])
def test_logits_exist_a_chunk_at_a_time(device_type, monkeypatch):
    monkeypatch.setattr(caption_decoder, "CPU_LOGITS", 2**14)
    torch.manual_seed(0)
    states, matrix = torch.randn(600, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.randint(512, (600,))
    with Allocations([states, matrix, targets]) as allocations:
        with torch.autocast("cpu", torch.bfloat16, enabled=device_type is not None):
            losses = token_losses(states, matrix, targets)
        losses.sum().backward()
    assert losses.dtype == torch.float32
    assert allocations.peak < 5 * 4 * 2**14  # all at once they are 1.2 MB
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if device_type is None else {"rtol": 2e-2, "atol": 5e-2}
    found = losses, states.grad, matrix.grad
    states, matrix = (leaf.detach().requires_grad_() for leaf in (states, matrix))
    plain = nn.functional.cross_entropy(states @ matrix.T, targets, reduction="none")
    plain.sum().backward()
    torch.testing.assert_close(found, (plain, states.grad, matrix.grad), **tolerance)
