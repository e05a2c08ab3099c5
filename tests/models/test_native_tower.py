"""The image tower on images of any shape: packed, padded, one by one, on squares, and as transformers computes it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from contrastive.errors import UserError
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.models.init import initialise_tower
from contrastive.models.patch_embedding import Places
from contrastive.models.transformer import Block
from contrastive.patches import Patches

PATCH, WIDTH = 4, 32
GRIDS = [(1, 8), (8, 1), (3, 3), (2, 5), (5, 2), (3, 3), (4, 4), (1, 1), (2, 4), (6, 2)]


def tower_of(pool="attention", **options) -> ImageTower:
    shape = {"image_size": 16, "patch_size": PATCH, "width": WIDTH, "depth": 2, "num_heads": 2, "mlp_dim": 64}
    tower = ImageTower(ImageTowerConfig(**shape, pool=pool, native=True, **options), WIDTH)
    torch.manual_seed(0)
    initialise_tower(tower, "siglip")
    with torch.no_grad():
        for parameter in tower.parameters():  # biases and a class token that are not 0 tell more
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


def images_of(grids, seed=1) -> list[Patches]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((3, rows * PATCH, columns * PATCH) for rows, columns in grids)
    return [Patches.of(torch.randn(size, generator=generator), PATCH) for size in sizes]


POOLS = [
    {"pool": "attention"},
    {"pool": "average", "position": "sincos"},
    {"pool": "class", "class_token": True, "pre_norm": True, "patch_bias": False},
    {"pool": "average", "class_token": True},
    {"pool": "attention", "class_token": True, "projection": True},
]


@pytest.mark.parametrize("options", POOLS)
def test_an_image_is_embedded_alike_in_any_company(options):
    """Packed, padded, alone, in another order and beside others: to 1e-6."""
    tower, images = tower_of(**options), images_of(GRIDS)
    batch = Patches.batch(images)
    with torch.no_grad():
        packed = tower(batch)
        alone = torch.cat([tower(one[None]) for one in images])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
        mixed = tower(batch[order])[order.argsort()]
        # More padding, of anything, and neighbours that are larger.
        wide = Patches.batch([*images, *images_of([(5, 5)], seed=3)])
        wide.values[~wide.mask] = 1e4
        beside = tower(wide)[:-1]
        assert tower(batch[:0]).shape == (0, WIDTH)
        tower.packs = False
        padded = tower(wide)[:-1]
        assert tower(batch[:0]).shape == (0, WIDTH)
    for other in (alone, mixed, beside, padded):
        torch.testing.assert_close(other, packed, rtol=0, atol=2e-6)
    assert (packed[2] - packed[5]).abs().max() > 1e-2  # two images of one shape


@pytest.mark.parametrize("options", POOLS)
def test_gradients_are_the_same_packed_and_padded(options):
    found = []
    for packs in (True, False):
        tower = tower_of(**options).double()
        tower.packs = packs
        batch = Patches.batch(images_of(GRIDS))
        batch = batch.to(torch.float64)
        batch.values.requires_grad_()
        weights = torch.randn(len(GRIDS), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        (tower(batch) * weights).sum().backward()
        found.append([batch.values.grad, *(p.grad for p in tower.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    assert found[0][0][~batch.mask].abs().max() == 0  # nothing reads padding


@pytest.mark.parametrize("options", POOLS)
def test_squares_give_what_the_square_path_gives(options):
    tower = tower_of(**options)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    patches = Patches.of(pixels, PATCH)
    for packs in (True, False):
        tower.packs = packs
        torch.testing.assert_close(tower(patches), tower(pixels), rtol=0, atol=2e-6)
        torch.testing.assert_close(tower.forward_features(patches), tower.forward_features(pixels), rtol=0, atol=2e-6)
    wide = pixels[:, :, :8].contiguous()  # and images of another shape than the positions' grid
    torch.testing.assert_close(tower(Patches.of(wide, PATCH)), tower(wide), rtol=0, atol=2e-6)


@pytest.mark.parametrize("packs", [True, False])
def test_tokens_and_states_are_those_of_each_image_and_0_behind(packs):
    tower, images = tower_of(), images_of(GRIDS)
    tower.packs = packs
    batch = Patches.batch(images)
    tokens, states = tower.forward_features(batch), tower.states(batch, {0, 1, 2})
    for row, one in enumerate(images):
        n = len(one.values)
        torch.testing.assert_close(tokens[row, :n], tower.forward_features(one[None])[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(states[1][row, :n], tower.states(one[None], {1})[1][0], rtol=0, atol=2e-6)
        assert not tokens[row, n:].any() and not states[2][row, n:].any()
    torch.testing.assert_close(tower.norm(states[2])[batch.mask], tokens[batch.mask], rtol=0, atol=2e-6)
    torch.testing.assert_close(tower.pooled(tokens, images=batch), tower(batch), rtol=0, atol=2e-6)


def test_positions_are_torchs_bilinear_antialiased_resampling():
    table = torch.randn(16 * 16, 8, generator=torch.Generator().manual_seed(6))
    square = table.double().unflatten(0, (16, 16)).permute(2, 0, 1)[None]  # in float32 torch's own is off by 3e-6
    for grid in [(1, 1), (16, 16), (3, 40), (40, 3), (17, 15), (1, 256)]:
        wanted = torch.nn.functional.interpolate(square, size=grid, mode="bilinear", antialias=True)[0].flatten(1).T
        found = Places.of(torch.tensor(grid), torch.arange(grid[0] * grid[1])).sample(table, (16, 16))
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


def test_patches_lie_as_transformers_has_them_and_come_back():
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    image = torch.arange(3 * 8 * 12).view(3, 8, 12)
    patches = Patches.of(image, PATCH)
    assert torch.equal(patches.values, convert_image_to_patches(image, PATCH))
    assert patches.grids.tolist() == [2, 3] and torch.equal(patches.pixels(), image)
    assert torch.equal(Patches.batch(images_of([(3, 3)]) + [patches.to(torch.float32)])[1].pixels(), image.float())


def test_compiled_blocks_are_not_made_again_for_each_number_of_lengths():
    tower, made = tower_of(pool="average").train(), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    tower.transformer.blocks[0].compiled = torch.compile(Block.through, backend=made)
    counts = []
    for number in (5, 3, 4, 2, 6, 7):
        batch = Patches.batch(images_of([(1, length) for length in range(3, 3 + number)]))
        torch.testing.assert_close(tower(batch), tower.eval()(batch), rtol=0, atol=2e-6)
        tower.train()
        counts.append(made.frame_count)
    assert counts[0] > 0 and counts[2:] == [counts[2]] * 4


def test_chunks_are_cut_to_their_own_longest():
    batch = Patches.batch(images_of(GRIDS))
    parts = batch.chunk(5)
    assert [part.values.shape[1] for part in parts] == [8, 10, 10, 16, 12]
    assert torch.equal(torch.cat([part.grids for part in parts]), batch.grids)


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="for towers with model.image.native"):
        ImageTower(ImageTowerConfig(image_size=16, patch_size=4, width=8, depth=1, num_heads=1, mlp_dim=8), 8)(
            Patches.batch(images_of([(1, 2)]))
        )
    with pytest.raises(UserError, match=r"Patches of \(1, 2, 48\).*\(B, N, 192\)"):
        tower = ImageTowerConfig(image_size=16, patch_size=8, width=8, depth=1, num_heads=1, mlp_dim=8, native=True)
        ImageTower(tower, 8)(Patches.batch(images_of([(1, 2)])))
    with pytest.raises(UserError, match="Patches are torch.uint8, not normalised floats"):
        tower_of()(Patches.batch(images_of([(1, 2)])).to(torch.uint8))
    with pytest.raises(UserError, match="patch_dropout is not for native"):
        ImageTowerConfig(native=True, patch_dropout=0.5).check()
