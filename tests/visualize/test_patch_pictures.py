"""Patch tokens against texts and as colours; position embeddings, filters, embeddings."""

import pytest
import torch
import torch.nn.functional as F
from towers import KINDS, every_kind, noise, small_tower

from contrastive.visualize.representations import (
    above_mean,
    effective_rank,
    evenly_spread,
    filter_components,
    match_probabilities,
    mean_cosine,
    patch_embeddings,
    pca_colours,
    position_similarity,
    principal_components,
    random_tower,
    strongest_filters,
    text_similarity,
    trace,
)

EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].class_token])
@torch.no_grad()
def test_a_picture_of_one_patch_is_embedded_as_its_patch(kind):
    tower = small_tower(kind)
    pixels = noise(2, 3, 8, 8)
    patches = patch_embeddings(tower, trace(tower, pixels).patch_tokens)
    torch.testing.assert_close(patches[:, 0], F.normalize(tower(pixels), dim=-1), **EXACT)


@every_kind
@torch.no_grad()
def test_each_patch_is_embedded_by_itself(kind):
    tower = small_tower(kind)
    tokens = noise(2, 9, 32)
    patches = patch_embeddings(tower, tokens)
    assert patches.shape == (2, 9, 16 if tower.projection else 32)
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(2, 9), **EXACT)
    torch.testing.assert_close(patch_embeddings(tower, tokens[1:, 4:5])[0, 0], patches[1, 4], **EXACT)


@torch.no_grad()
def test_class_tokens_way_through_the_projection():
    tower = small_tower("class")
    seen = trace(tower, noise(1, 3, 24, 24))
    # Were the class token a patch, it would be embedded as the image is.
    as_patch = patch_embeddings(tower, seen.tokens[:, :1])
    torch.testing.assert_close(as_patch[:, 0], F.normalize(tower(noise(1, 3, 24, 24)), dim=-1), **EXACT)


@torch.no_grad()
def test_averaged_patches_are_the_image():
    tower = small_tower("average")
    seen = trace(tower, noise(1, 3, 24, 24))
    torch.testing.assert_close(seen.patch_tokens.mean(dim=1), tower(noise(1, 3, 24, 24)), **EXACT)


def test_text_similarity_by_hand():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = text_similarity(patches, texts)
    assert found.tolist() == pytest.approx(torch.tensor([[[0, 1, 0.8], [1, 0, 0.6]]]))
    apart = above_mean(found)
    torch.testing.assert_close(apart, torch.tensor([[[-0.5, 0.5, 0.1], [0.5, -0.5, -0.1]]]))
    torch.testing.assert_close(apart.sum(dim=1), torch.zeros(1, 3))


def test_principal_components_of_known_variances():
    rotation = torch.linalg.qr(noise(6, 6))[0]
    sizes = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])
    rows = torch.linalg.qr(noise(40, 6, seed=2))[0] * sizes @ rotation.T
    directions, variances = principal_components(rows)
    torch.testing.assert_close(variances, sizes**2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((directions @ rotation).abs(), torch.eye(6), rtol=0, atol=1e-4)
    assert (directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)) > 0).all()
    fewer, found = principal_components(rows[:2])
    assert fewer.shape == (2, 6) and found.shape == (2,)


def test_colours_follow_the_components():
    tokens = torch.zeros(2, 8, 5)
    ramp = torch.linspace(-1, 1, 16).reshape(2, 8)
    tokens[..., 3] = 10 * ramp  # the only variance
    colours = pca_colours(tokens + 7)
    torch.testing.assert_close(colours.explained, torch.tensor([1.0, 0.0, 0.0]))
    red = colours.rgb[..., 0].flatten()
    assert (red.diff() >= 0).all() and red[0] == 0 and red[-1] == 1
    torch.testing.assert_close(colours.rgb[..., 1:], torch.full((2, 8, 2), 0.5))


def test_colours_of_one_image_do_not_depend_on_where_it_stands():
    tokens = noise(3, 9, 12)
    rgb = pca_colours(tokens).rgb
    torch.testing.assert_close(pca_colours(tokens.flip(0)).rgb.flip(0), rgb, rtol=0, atol=1e-4)
    assert rgb.min() == 0 and rgb.max() == 1 and rgb.shape == (3, 9, 3)


def test_colours_of_a_single_patch_and_of_an_odd_one():
    assert torch.equal(pca_colours(noise(1, 1, 8)).rgb, torch.full((1, 1, 3), 0.5))
    tokens = noise(4, 100, 8)
    tokens[0, 0] *= 1000
    assert pca_colours(tokens).rgb[1:].std(dim=(0, 1)).min() > 0.05


@every_kind
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_position_similarity(kind, position):
    tower = small_tower(kind, position=position)
    found = position_similarity(tower)
    assert found.shape == (3, 3, 3, 3)
    flat = found.flatten(0, 1).flatten(1)
    torch.testing.assert_close(flat.diagonal(), torch.ones(9), **EXACT)
    torch.testing.assert_close(flat, flat.T, **EXACT)
    own = tower.position_embedding[tower.num_prefix_tokens :].detach()
    torch.testing.assert_close(found[1, 2, 0, 1], F.cosine_similarity(own[5], own[1], dim=0), **EXACT)


def test_positions_of_a_tower_made_wider():
    tower = small_tower("class")
    tower.set_input_size((16, 32))
    assert position_similarity(tower).shape == (2, 4, 2, 4)
    assert random_tower(tower)(noise(1, 3, 16, 32)).shape == (1, 16)


def test_evenly_spread():
    assert evenly_spread(3, 5) == [0, 1, 2]
    assert evenly_spread(9, 5) == [0, 2, 4, 6, 8]
    assert evenly_spread(1000, 3) == [0, 500, 999] and evenly_spread(1000, 1) == [0]


def test_filters_have_the_components_they_were_made_of():
    tower = small_tower("average")
    stripe, spot = torch.zeros(2, 3, 8, 8)
    stripe[:, ::2], spot[0, 3, 4] = 1.0, 1.0
    stripe, spot = stripe / stripe.norm(), spot - (spot * stripe).sum() * stripe
    weights = noise(32, 2)
    weights = torch.linalg.qr(weights - weights.mean(dim=0))[0] * torch.tensor([3.0, 1.0])
    with torch.no_grad():
        tower.patch_embed.weight.copy_((weights @ torch.stack([stripe, spot]).flatten(1)).unflatten(1, (3, 8, 8)))
    found = filter_components(tower)
    cosine = F.cosine_similarity(found.filters[0].flatten(), stripe.flatten(), dim=0)
    assert cosine.abs() > 0.999 and found.explained[0] == pytest.approx(0.9, abs=0.02)
    assert found.explained.sum() == pytest.approx(1.0, abs=1e-5)
    strongest = strongest_filters(tower, 5)
    norms = strongest.flatten(1).norm(dim=1)
    assert strongest.shape == (5, 3, 8, 8) and (norms.diff() <= 0).all()
    assert norms[0] == tower.patch_embed.weight.flatten(1).norm(dim=1).max()


def test_random_tower_is_new_and_leaves_the_generator_alone():
    tower = small_tower("attention, projection", seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fresh = random_tower(tower)
    assert torch.equal(torch.rand(1), expected)
    assert not fresh.training and fresh(noise(2, 3, 24, 24)).shape == (2, 16)
    assert not torch.equal(fresh.patch_embed.weight, tower.patch_embed.weight)
    assert torch.equal(fresh.norm.weight, torch.ones(32))  # nothing of the trained one is left in it
    assert torch.equal(random_tower(tower).patch_embed.weight, fresh.patch_embed.weight)


def test_effective_rank_and_mean_cosine():
    assert effective_rank(torch.eye(4)) == pytest.approx(4)
    assert effective_rank(torch.ones(4, 7)) == pytest.approx(1, abs=1e-5)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0)
    assert mean_cosine(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])) == pytest.approx(1 / 3)


def test_match_probabilities_are_the_losses():
    cosines = torch.tensor([[0.5, 0.1], [0.0, 0.2]])
    apart = match_probabilities(cosines, torch.tensor(10.0), torch.tensor(-3.0))
    torch.testing.assert_close(apart, torch.sigmoid(10 * cosines - 3))
    shared = match_probabilities(cosines, torch.tensor(10.0), None)
    torch.testing.assert_close(shared.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(shared[0, 0] / shared[0, 1], torch.tensor(4.0).exp())
