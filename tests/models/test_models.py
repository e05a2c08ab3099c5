import warnings
from dataclasses import replace

import pytest
import torch
from torchvision.models import vit_b_16, vit_h_14, vit_l_16

import contrastive
from contrastive.errors import UserError
from contrastive.models import (
    ClassifierConfig,
    DualEncoder,
    ImageClassifier,
    ImageTower,
    ImageTowerConfig,
    ModelConfig,
    TextTower,
    TextTowerConfig,
    classifier_config,
    list_classifiers,
)
from contrastive.models.image_tower import drop_patches
from contrastive.models.patch_embedding import interpolate_position_embedding, sincos_position_embedding
from contrastive.models.presets import model_config
from contrastive.models.transformer import Attention

IMAGE = ImageTowerConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=64)
TEXT = TextTowerConfig(vocab_size=50, context_length=10, width=32, depth=2, num_heads=4, mlp_dim=64, eos_id=2, pad_id=0)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # OpenAI's CLIP; google/siglip-*-patch*-224 with learned scalars
        ("clip_vit_b_32", 151_277_313),
        ("clip_vit_b_16", 149_620_737),
        ("clip_vit_l_14", 427_616_513),
        ("siglip_vit_b_16", 203_155_970),
    ],
)
def test_published_parameter_counts(name, millions):
    with torch.device("meta"):
        assert count(contrastive.create_model(name)) == millions


@pytest.mark.parametrize(
    ("size", "millions"),
    [("ti", 5.5), ("s", 21.7), ("b", 85.8), ("l", 303.3), ("h", 630.9)],  # ViT table 1 (86, 307, 632), DeiT (5, 22)
)
def test_vit_sizes_without_heads(size, millions):
    config = replace(model_config(f"clip_vit_{size}_16").image, pre_norm=False, projection=False)
    with torch.device("meta"):
        assert count(ImageTower(config, config.width)) / 1e6 == pytest.approx(millions, abs=0.11)


def test_every_listed_model_builds():
    with torch.device("meta"):
        for name in contrastive.list_models():
            assert isinstance(contrastive.create_model(name), DualEncoder)


def test_spelled_out_sizes_and_typos():
    assert model_config("SigLIP-ViT-base-16") == model_config("siglip_vit_b_16")
    with pytest.raises(UserError, match="Did you mean 'siglip_vit_b_16'"):
        contrastive.create_model("siglip_vit_b_61")


@pytest.mark.parametrize("pool", ["class", "average", "attention"])
@pytest.mark.parametrize("position", ["learned", "sincos"])
@pytest.mark.parametrize("projection", [False, True])
def test_image_tower_shapes_and_gradients(pool, position, projection):
    config = replace(
        IMAGE, pool=pool, class_token=pool == "class", position=position, projection=projection, pre_norm=projection
    )
    tower = ImageTower(config, 32)
    out = tower(torch.randn(3, 3, 32, 32))
    assert out.shape == (3, 32)
    out.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


@pytest.mark.parametrize(("pool", "causal"), [("eos", True), ("last", False), ("average", False)])
def test_text_tower_shapes_and_gradients(pool, causal):
    tower = TextTower(replace(TEXT, pool=pool, causal=causal), 16)
    tokens = torch.tensor([[1, 7, 8, 2, 0, 0, 0, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0, 0, 0, 0]])
    out = tower(tokens)
    assert out.shape == (2, 16)
    out.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_causal_text_ignores_what_follows_the_end():
    tower = TextTower(replace(TEXT, pool="eos", causal=True), 16).eval()
    short = torch.tensor([[1, 7, 8, 2, 0, 0]])
    other = torch.tensor([[1, 7, 8, 2, 5, 9]])
    assert torch.allclose(tower(short), tower(other), atol=1e-6)
    bidirectional = TextTower(replace(TEXT, pool="eos"), 16).eval()
    assert not torch.allclose(bidirectional(short), bidirectional(other), atol=1e-3)


def test_a_tower_that_reads_the_last_position_says_when_texts_are_not_padded_to_it():
    tower = TextTower(replace(TEXT, pool="last"), 16)
    tokens = torch.randint(3, 50, (2, 10))
    with pytest.warns(UserWarning, match="7 tokens a text, where this text tower reads the last of 10 positions"):
        tower(tokens[:, :7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower(tokens)
        for pool in ("eos", "average"):
            TextTower(replace(TEXT, pool=pool), 16)(tokens[:, :7])


def test_average_pool_ignores_padding():
    tower = TextTower(replace(TEXT, pool="average", causal=True), 16).eval()
    assert torch.allclose(tower(torch.tensor([[1, 7, 2]])), tower(torch.tensor([[1, 7, 2, 0, 0]])), atol=1e-6)


def test_attention_equals_multi_head_attention():
    ours = Attention(32, 4)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 7, 32)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-6)
    mask = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    assert torch.allclose(ours(x, is_causal=True), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], atol=1e-6)


def test_sincos_is_two_dimensional_and_distinct():
    grid = sincos_position_embedding(3, 5, 16)
    assert grid.shape == (15, 16)
    assert len({tuple(row.tolist()) for row in grid}) == 15
    columns, rows = grid.view(3, 5, 16)[..., :8], grid.view(3, 5, 16)[..., 8:]
    assert torch.equal(columns[0], columns[2]) and torch.equal(rows[:, 0], rows[:, 4])


def test_positions_follow_another_image_size():
    tower = ImageTower(IMAGE, 32).eval()
    assert tower(torch.randn(1, 3, 48, 40)).shape == (1, 32)
    with pytest.raises(UserError, match="multiples of 8"):
        tower(torch.randn(1, 3, 33, 32))
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None]  # grows with the row
    larger = interpolate_position_embedding(ramp, (4, 4), (8, 8)).view(8, 8)
    assert torch.all(larger.diff(dim=0) > 0) and torch.allclose(larger.diff(dim=1), torch.zeros(8, 7), atol=1e-5)
    assert interpolate_position_embedding(ramp, (4, 4), (4, 4)) is ramp


def test_patch_dropout_keeps_tokens_whole():
    x = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    kept = drop_patches(x, 0.7)
    assert kept.shape == (2, 3, 3)
    for image, tokens in zip(kept, x, strict=True):
        assert all(any(torch.equal(token, row) for row in tokens) for token in image)
    tower = ImageTower(replace(IMAGE, patch_dropout=0.5), 32)
    pixels = torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower(pixels), tower(pixels))
    tower.eval()
    assert torch.equal(tower(pixels), tower(pixels))


def test_gradient_checkpointing_changes_no_gradient():
    pixels = torch.randn(2, 3, 32, 32)
    grads, kept = [], []
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        tower = ImageTower(replace(IMAGE, depth=2), 32)
        tower.transformer.gradient_checkpointing = share
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t.numel()) or t, lambda t: t):
            loss = tower(pixels).square().sum()
        loss.backward()
        grads.append([p.grad for p in tower.parameters()])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))
    assert kept[0] > kept[1] > kept[2]


def test_dual_encoder_normalises_and_has_a_bias_only_when_asked():
    config = ModelConfig(embed_dim=32, image=IMAGE, text=TEXT, init_logit_scale=10.0, init_logit_bias=-4.0)
    model = DualEncoder(config)
    features = model(torch.randn(2, 3, 32, 32), torch.randint(3, 50, (2, 10)))
    assert torch.allclose(features.image.norm(dim=1), torch.ones(2)) and torch.allclose(
        features.text.norm(dim=1), torch.ones(2)
    )
    assert features.logit_scale.item() == pytest.approx(10.0) and features.logit_bias.item() == -4.0
    raw = model.encode_image(torch.randn(2, 3, 32, 32), normalize=False)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(2), atol=1e-3)
    assert DualEncoder(replace(config, init_logit_bias=None)).logit_bias is None


def test_mimetic_attention_reads_what_is_alike_and_puts_out_its_opposite():
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(embed_dim=32, image=IMAGE, text=TEXT, init="mimetic"))
    for tower in (model.image_tower, model.text_tower):
        for attention in (block.attention for block in tower.transformer.blocks):
            heads = zip(
                attention.q_proj.weight.chunk(attention.num_heads),
                attention.k_proj.weight.chunk(attention.num_heads),
                strict=True,
            )
            for q, k in heads:  # (D / H, D): the best W of that rank, whose trace the rank cuts to about its share
                assert (q.T @ k).trace() > 0.5 * 0.7 * len(q)
            put_out = attention.out_proj.weight @ attention.v_proj.weight  # −0.4 I and noise of size 0.4
            assert -0.6 < put_out.trace() / len(put_out) < -0.2


@pytest.mark.parametrize("init", ["clip", "siglip", "mimetic"])
def test_initial_features_are_alive(init):
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(embed_dim=32, image=IMAGE, text=TEXT, init=init))
    image = model.encode_image(torch.randn(8, 3, 32, 32))
    text = model.encode_text(torch.randint(3, 50, (8, 10)))
    for features in (image, text):
        assert features.isfinite().all() and (features @ features.T).fill_diagonal_(0).max() < 0.9999
    residual = [m.attention.out_proj.weight.std() for m in model.image_tower.transformer.blocks]
    assert all(std > 0 for std in residual)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "30 is not a multiple of model.image.patch_size 8; use 24 or 32"),
        ({"num_heads": 5}, "not a multiple of model.image.num_heads"),
        ({"pool": "class"}, "needs model.image.class_token"),
        ({"width": 64, "num_heads": 4}, "model.image.width 64 differs from model.embed_dim 32"),
    ],
)
def test_contradictory_image_options(changes, message):
    with pytest.raises(UserError, match=message):
        ImageTower(replace(IMAGE, **changes), 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "vocab_size is not set"),
        ({"pool": "eos", "eos_id": None}, "needs model.text.eos_id"),
        ({"pad_id": 50}, "outside the vocabulary of 50"),
    ],
)
def test_contradictory_text_options(changes, message):
    with pytest.raises(UserError, match=message):
        TextTower(replace(TEXT, **changes), 32)


def test_what_blocks_add_to_stays_float32_under_autocast():
    """As in transformers and timm: rounded to bfloat16 at every block, the sum would lose what small updates add."""
    torch.manual_seed(0)
    tower = ImageTower(ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32), 16)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert tower.embed(pixels).dtype == torch.float32
        assert tower.transformer(tower.embed(pixels)).dtype == torch.float32
    assert tower.to(torch.bfloat16).embed(pixels.bfloat16()).dtype == torch.bfloat16


SMALL = ImageTowerConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32, pool="average")


@pytest.mark.parametrize(("name", "reference"), [("base", vit_b_16), ("large", vit_l_16), ("huge", vit_h_14)])
def test_sizes_are_the_papers(name, reference, monkeypatch):
    """Table 1 of the paper says 86, 307 and 632 million; torchvision's models have the exact number."""
    monkeypatch.setattr("contrastive.models.encoders.initialise_tower", lambda *_: None)  # slow, and not the point
    with torch.device("meta"):
        model, theirs = ImageClassifier(replace(classifier_config(name), num_classes=1000)), reference()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_names_of_classifiers():
    assert list_classifiers() == ["tiny", "small", "base", "large", "huge"]
    with pytest.raises(UserError, match="unknown model 'bse'. Did you mean 'base'"):
        classifier_config("bse")


def test_scores_start_equal_and_the_head_reads_the_features():
    torch.manual_seed(0)
    model = ImageClassifier(ClassifierConfig(SMALL, num_classes=3)).eval()
    pixels = torch.randn(4, 3, 16, 16)
    assert torch.equal(model(pixels), torch.zeros(4, 3))
    torch.nn.init.normal_(model.head.weight)
    expected = model.encode_image(pixels, normalize=False) @ model.head.weight.T
    torch.testing.assert_close(model(pixels), expected)
    model.config = replace(model.config, unit_features=True)
    torch.testing.assert_close(model(pixels), model.encode_image(pixels) @ model.head.weight.T)


def test_features_before_and_after_the_projection():
    model = ImageClassifier(ClassifierConfig(replace(SMALL, projection=True), embed_dim=8, num_classes=3)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    before = model.encode_image(pixels, normalize=False, project=False)
    assert before.shape == (2, 16) and model.config.embed_dim == 8
    projected = model.image_tower.projection(before)
    torch.testing.assert_close(model.encode_image(pixels, normalize=False), projected)
    torch.testing.assert_close(model.encode_image(pixels).norm(dim=1), torch.ones(2))


def test_the_number_of_classes_must_be_known():
    with pytest.raises(UserError, match="model.num_classes"):
        ImageClassifier(ClassifierConfig(SMALL))


@pytest.mark.parametrize(("pool", "length", "kept"), [("eos", 16, False), ("eos", 6, True), ("last", 6, False)])
def test_positions_of_texts_of_another_length(pool, length, kept):
    tower = TextTower(replace(TEXT, pool=pool, causal=pool == "eos"), 16)
    torch.nn.init.normal_(tower.position_embedding)
    before, tokens = tower.position_embedding.detach().clone(), torch.randint(3, 50, (3, length))
    tokens[:, 4] = TEXT.eos_id
    first = tower(tokens) if kept else None
    assert tower.set_context_length(length).startswith("the first 6" if kept else f"resampled for {length}")
    # as open_clip's resize_text_pos_embed
    resampled = torch.nn.functional.interpolate(before.T[None], size=length, mode="linear", align_corners=False)[0].T
    assert torch.equal(tower.position_embedding, before[:length] if kept else resampled)
    assert tower.config.context_length == length and tower(tokens).shape == (3, 16)
    if kept:
        assert torch.equal(tower(tokens), first)  # its texts are what they were
