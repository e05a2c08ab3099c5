"""Texts computed without their padding: the same embeddings and gradients as with it."""

import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from contrastive.config import from_dict
from contrastive.errors import UserError
from contrastive.evaluate.embeddings import embed_texts
from contrastive.models import (
    DualEncoder,
    ImageTowerConfig,
    ModelConfig,
    PackedTokens,
    TextTower,
    TextTowerConfig,
    packing,
)
from contrastive.models.init import initialise_tower

TEXT = TextTowerConfig(vocab_size=50, context_length=8, width=16, depth=2, num_heads=2, mlp_dim=32, eos_id=2, pad_id=0)
KINDS = {
    "causal eos": {"causal": True, "pool": "eos"},
    "causal average": {"causal": True, "pool": "average"},
    "bidirectional average": {"pool": "average", "attend_padding": False},
    "bidirectional eos": {"pool": "eos", "attend_padding": False},
}
# In float32 the gradients are sums over 64 tokens, which processors add up in orders of their own: apart by 1.25e-6 of
# 1.15 on one where another stayed within 1e-6. Float64 is the sharp test.
FLOAT32 = 5e-6
TOKENS = torch.tensor(
    [
        [1, 7, 8, 2, 0, 0, 0, 0],
        [1, 7, 0, 9, 6, 2, 0, 0],  # the padding's id in the middle
        [1, 9, 8, 7, 6, 5, 4, 2],  # full
        [2, 0, 0, 0, 0, 0, 0, 0],  # one token
        [1, 6, 5, 2, 9, 2, 0, 0],  # tokens behind the end
        [1, 6, 5, 4, 0, 0, 0, 0],  # no end
        [0, 0, 0, 0, 0, 0, 0, 0],  # nothing at all
        [1, 5, 5, 2, 0, 0, 0, 0],
    ]
)


def tower(kind, **changes):
    torch.manual_seed(0)
    made = TextTower(replace(TEXT, **KINDS[kind], **changes), 16)
    initialise_tower(made, "clip")
    return made


def results(model, tokens):
    """Embeddings, and the gradient of each parameter of something that depends on all of them."""
    model.zero_grad()
    out = model(tokens)
    (out * torch.arange(1, 1 + out.numel(), dtype=out.dtype).sin().view_as(out)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded(kind):
    for share in (0.0, 1.0):
        model = tower(kind)
        model.transformer.gradient_checkpointing = share
        for rows in (slice(None), slice(0, 1), slice(3, 4)):
            packed = model.pack(TOKENS[rows])
            assert isinstance(packed, PackedTokens) and len(packed.ids) <= TOKENS[rows].numel() * 5 // 8
            same(results(model.float(), packed), results(model, TOKENS[rows]), FLOAT32)
            same(results(model.double(), packed), results(model, TOKENS[rows]), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_has_no_part_in_the_embedding(kind):
    """The padded reference itself: other tokens behind the end of a text change nothing."""
    model = tower(kind).eval()
    short, other = (torch.tensor([[1, 7, 2, *tail]]) for tail in ([0, 0, 0], [0] * 5))
    if "eos" in kind:
        other = torch.tensor([[1, 7, 2, 9, 2, 4, 5]])
    torch.testing.assert_close(model(short), model(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"pool": "last"}, {"pool": "last", "causal": True}, {"pool": "average"}])
def test_texts_whose_padding_counts_are_not_packed(options):
    assert TextTower(replace(TEXT, **options), 16).pack(TOKENS) is TOKENS


def test_attention_to_padding_is_what_the_option_says():
    attending, not_attending = (
        TextTower(replace(TEXT, pool="average", attend_padding=attend), 16).eval() for attend in (True, False)
    )
    initialise_tower(attending, "clip")
    not_attending.load_state_dict(attending.state_dict())
    alone = TOKENS[:1, :4]
    torch.testing.assert_close(not_attending(TOKENS[:1]), attending(alone), rtol=0, atol=1e-6)
    assert (attending(TOKENS[:1]) - attending(alone)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True, "pool": "eos"}, "attend_padding false has no effect with model.text.causal"),
        ({"pool": "last"}, "attend_padding false has no effect with model.text.pool last"),
    ],
)
def test_where_the_option_would_do_nothing(options, message):
    with pytest.raises(UserError, match=message):
        TextTower(replace(TEXT, attend_padding=False, **options), 16)


def test_texts_longer_than_the_context_are_refused():
    with pytest.raises(UserError, match="9 tokens per text, but the model's context_length is 8"):
        tower("causal eos").pack(F.pad(TOKENS, (0, 1)))


def test_a_configuration_from_before_the_option_attends_as_it_did():
    options = asdict(TEXT)
    del options["attend_padding"]
    assert from_dict(TextTowerConfig, options, "config.json") == TEXT


def test_the_kernel_of_a_gpu_is_given_where_each_text_begins(monkeypatch):
    """A stand-in that cuts by `cu_seq` as torch documents it gives what slices of equal length give."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(q)
        assert q.shape[1:] == (2, 8) and max_q == max_k >= cu_seq_q.diff().max() and cu_seq_q.diff().min() > 0
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        texts = zip(*(part.tensor_split(cu_seq_q[1:-1].long()) for part in (q, k, v)), strict=True)
        attended = (
            F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in text), is_causal=causal) for text in texts
        )
        return torch.cat([text.transpose(0, 1) for text in attended])

    expected = {kind: results(tower(kind).double(), tower(kind).pack(TOKENS)) for kind in KINDS}
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    monkeypatch.setattr(packing, "_has_varlen_kernel", lambda q, dropout: True)
    for kind in KINDS:
        same(results(tower(kind).double(), tower(kind).pack(TOKENS)), expected[kind], 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded_on_a_gpu(kind):
    model = tower(kind).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        packed, padded = model(model.pack(TOKENS).to("cuda")), model(TOKENS.cuda())
    torch.testing.assert_close(packed, padded, rtol=0.05, atol=0.05)


def test_evaluation_embeds_texts_packed():
    image = ImageTowerConfig(image_size=8, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16)
    model = DualEncoder(ModelConfig(embed_dim=16, image=image, text=replace(TEXT, **KINDS["causal eos"])))
    seen = []
    model.text_tower.register_forward_pre_hook(lambda _, given: seen.append(type(given[0])))
    found = embed_texts(model, lambda texts: TOKENS[: len(texts)], ["a"] * 8, device="cpu")
    assert seen == [PackedTokens]
    torch.testing.assert_close(found, model.encode_text(TOKENS), rtol=0, atol=1e-6)


def test_packed_batches_have_few_sizes():
    """Else each step would be another one to the libraries that do its products, and to the allocator."""
    model, generator = tower("causal eos"), torch.Generator().manual_seed(0)
    sizes, padding = set(), 0
    for _ in range(100):
        tokens = torch.full((64, 8), 5)
        tokens[range(64), torch.randint(0, 8, (64,), generator=generator)] = TEXT.eos_id
        packed = model.pack(tokens)
        own = len(packed.ids) - int((tokens == TEXT.eos_id).int().argmax(1).add(1).sum())
        sizes.add(len(packed.ids))
        padding = max(padding, own / len(packed.ids))
    assert len(sizes) <= 8 and padding < 1 / 16
