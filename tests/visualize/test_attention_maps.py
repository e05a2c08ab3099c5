"""Attention weights, what they are read from, and rollout."""

import pytest
import torch
from towers import every_kind, noise, small_tower

from contrastive.errors import UserError
from contrastive.visualize.representations import (
    attention_weights,
    block_attention,
    query_attention,
    reading_attention,
    rollout,
    rollout_reading,
    trace,
)

EXACT = {"rtol": 0, "atol": 1e-5}


@every_kind
@torch.no_grad()
def test_weights_make_the_blocks_own_output(kind):
    tower = small_tower(kind)
    seen = trace(tower, noise(2, 3, 24, 24))
    torch.testing.assert_close(seen.tokens, tower.forward_features(noise(2, 3, 24, 24)), **EXACT)
    for layer, block in enumerate(tower.transformer.blocks):
        x = block.norm1(seen.inputs[layer])
        weights = block_attention(tower, seen, layer)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), **EXACT)
        values = block.attention.v_proj(x).unflatten(-1, (4, -1)).transpose(1, 2)
        output = block.attention.out_proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, block.attention(x), **EXACT)


@torch.no_grad()
def test_weights_of_another_query_make_the_heads_own_output():
    tower = small_tower("attention")
    seen = trace(tower, noise(2, 3, 24, 24))
    head = tower.head.attention
    query = tower.head.probe.expand(2, -1, -1)
    weights = attention_weights(head, seen.tokens, query)
    values = head.v_proj(seen.tokens).unflatten(-1, (4, -1)).transpose(1, 2)
    output = head.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, head(seen.tokens, query=query), **EXACT)
    torch.testing.assert_close(reading_attention(tower, seen), weights[:, :, 0], **EXACT)


@every_kind
def test_the_pass_is_the_towers_at_another_size_too(kind):
    tower, pixels = small_tower(kind), noise(1, 3, 16, 40)
    seen = trace(tower, pixels)
    assert seen.grid == (2, 5) and len(seen.inputs) == 3
    assert seen.patch_tokens.shape == (1, 10, 32)
    torch.testing.assert_close(seen.tokens, tower.forward_features(pixels).detach(), **EXACT)


@every_kind
def test_rows_of_rollout_sum_to_one(kind):
    tower = small_tower(kind)
    seen = trace(tower, noise(2, 3, 24, 24))
    rolled, reading = rollout(tower, seen), rollout_reading(tower, seen)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(rolled.shape[:2]), **EXACT)
    torch.testing.assert_close(reading.sum(dim=-1), torch.ones(2), **EXACT)
    for layer in (None, 0, -1):
        heads = reading_attention(tower, seen, layer)
        assert heads.shape == (2, 4, seen.tokens.shape[1])
        torch.testing.assert_close(heads.sum(dim=-1), torch.ones(2, 4), **EXACT)


def set_attention(tower, sharpness):
    """Every token attends to those like it: keys are queries; the sharper, the more to itself alone."""
    for block in tower.transformer.blocks:
        block.norm1.reset_parameters()  # tokens of one length: none is more like oneself than oneself
        for projection in (block.attention.q_proj, block.attention.k_proj):
            projection.weight.data = torch.eye(32) * sharpness
            projection.bias.data.zero_()


def test_rollout_of_attention_to_oneself_is_the_identity():
    tower = small_tower("average", num_heads=1)
    set_attention(tower, sharpness=20.0)
    seen = trace(tower, noise(1, 3, 24, 24))
    torch.testing.assert_close(rollout(tower, seen)[0], torch.eye(9), **EXACT)
    torch.testing.assert_close(rollout_reading(tower, seen)[0], torch.full((9,), 1 / 9), **EXACT)


def test_rollout_of_uniform_attention_by_hand():
    tower = small_tower("class")
    set_attention(tower, sharpness=0.0)
    seen = trace(tower, noise(1, 3, 24, 24))
    # ((U + I) / 2)^3 with U·U = U: what stays on oneself halves with each of the three layers.
    expected = torch.full((10, 10), (1 - 1 / 8) / 10) + torch.eye(10) / 8
    torch.testing.assert_close(rollout(tower, seen)[0], expected, **EXACT)
    torch.testing.assert_close(rollout_reading(tower, seen)[0], expected[0], **EXACT)


def test_order_of_the_layers_by_hand():
    """The last layer reads one token alone, the first mixes: from the end it is the mixture that is read."""
    tower = small_tower("average", depth=2)
    seen = trace(tower, noise(1, 3, 24, 24))
    first, last = (block_attention(tower, seen, layer).mean(dim=1)[0] for layer in (0, 1))
    half = torch.eye(9) / 2
    torch.testing.assert_close(rollout(tower, seen)[0], (last / 2 + half) @ (first / 2 + half), **EXACT)


def test_where_attention_is_read_from():
    seen_by = {}
    for kind in ("class", "average, class token", "attention"):
        tower = small_tower(kind)
        seen = trace(tower, noise(1, 3, 24, 24))
        seen_by[kind] = (tower, seen, block_attention(tower, seen, 1))
    tower, seen, weights = seen_by["class"]
    assert torch.equal(reading_attention(tower, seen, 1), weights[:, :, 0])
    tower, seen, weights = seen_by["average, class token"]
    torch.testing.assert_close(reading_attention(tower, seen, 1), weights[:, :, 1:].mean(dim=2))
    assert torch.equal(query_attention(tower, seen, (1, 2), 1), weights[:, :, 1 + 5])
    tower, seen, weights = seen_by["attention"]
    torch.testing.assert_close(reading_attention(tower, seen, 1), weights.mean(dim=2))
    assert torch.equal(query_attention(tower, seen, (2, 0), 1), weights[:, :, 6])


def test_what_is_not_there_is_refused():
    tower = small_tower("average")
    seen = trace(tower, noise(1, 3, 24, 24))
    for layer in (3, -4):
        with pytest.raises(UserError, match="has 3 blocks; give 0 to 2, or -3 to -1"):
            block_attention(tower, seen, layer)
    for patch in ((3, 0), (0, 3), (-1, 0)):
        with pytest.raises(UserError, match="rows 0 to 2 and columns 0 to 2"):
            query_attention(tower, seen, patch)
