"""Positions for other image sizes: resampled once or on the fly, square or not, learned or fixed."""

from dataclasses import asdict, replace

import pytest
import torch
from test_image_encoder import CLASS, MAP, close, images, tower_of

from contrastive.errors import UserError
from contrastive.models import ImageTower
from contrastive.models.image_encoder import ImageEncoder
from contrastive.models.patch_embedding import interpolate_position_embedding, sincos_position_embedding

SIZES = [(48, 48), (16, 40), (24, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [MAP, CLASS, replace(CLASS, position="sincos")], ids=["map", "class", "sincos"])
@torch.no_grad()
def test_a_set_size_equals_one_on_the_fly(config, size):
    tower, pixels = tower_of(config), images(2, 3, *size)
    on_the_fly = tower(pixels)
    encoded = ImageEncoder(tower)(pixels)
    encoder = ImageEncoder(tower)
    encoder.set_input_size(size)
    tower.set_input_size(size)
    assert torch.equal(tower(pixels), on_the_fly) and torch.equal(encoder(pixels), encoded)
    assert tower.grid == encoder.grid_size == (size[0] // 8, size[1] // 8) and tower.input_size == size
    assert encoder.num_patches == encoder(pixels).shape[1]
    assert torch.equal(ImageEncoder(tower)(pixels), encoded), "an encoder of a resized tower"
    close(encoder(images(2, 3, 64, 16)), ImageEncoder(tower)(images(2, 3, 64, 16)))


@pytest.mark.parametrize("size", SIZES)
def test_positions_are_resampled_as_timm_does(size):
    from timm.layers import resample_abs_pos_embed

    tower = tower_of(CLASS)
    before = tower.position_embedding.detach().clone()
    tower.position_embedding.requires_grad_(False)
    tower.set_input_size(size)
    theirs = resample_abs_pos_embed(before[None], [size[0] // 8, size[1] // 8], num_prefix_tokens=1)[0]
    close(tower.position_embedding, theirs)
    assert not tower.position_embedding.requires_grad and "position_embedding" in dict(tower.named_parameters())


def test_interpolation_is_torchs_own_and_exact_under_autocast():
    embedding = torch.randn(15, 8, requires_grad=True)
    grid = embedding.unflatten(0, (3, 5)).permute(2, 0, 1)[None]
    for new in ((9, 2), (6, 10), (2, 5)):
        theirs = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True)
        theirs = theirs[0].permute(1, 2, 0).flatten(0, 1)
        ours = interpolate_position_embedding(embedding, (3, 5), new)
        close(ours, theirs)
        weights = torch.randn_like(ours)
        gradients = [torch.autograd.grad((x * weights).sum(), embedding, retain_graph=True)[0] for x in (ours, theirs)]
        close(*gradients)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(interpolate_position_embedding(embedding, (3, 5), new), ours)


def test_fixed_positions_are_computed_anew():
    tower = tower_of(replace(CLASS, position="sincos"))
    tower.set_input_size((16, 40))
    assert torch.equal(tower.position_embedding[1:], sincos_position_embedding(2, 5, 32))
    assert not tower.position_embedding[0].any() and "position_embedding" not in tower.state_dict()


def test_a_square_size_becomes_the_architecture():
    tower = tower_of(CLASS)
    keys = list(tower.state_dict())
    tower.set_input_size(48)
    assert tower.config.image_size == 48 and list(tower.state_dict()) == keys
    again = ImageTower(tower.config, 32)
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again.eval()(images(1, 3, 48, 48)), tower(images(1, 3, 48, 48)))
    tower.set_input_size((48, 24))
    assert asdict(tower.config) == asdict(again.config) and tower.grid == (6, 3), "a grid the options cannot tell"


def test_an_encoder_tells_its_size():
    encoder = ImageEncoder(tower_of())
    encoder.set_input_size(48)
    assert encoder.config.image_size == 48 and encoder.num_patches_per_side == 6
    encoder.set_input_size((16, 40))
    assert encoder.config.image_size == (16, 40)
    with pytest.raises(UserError, match="2×5 patches has no one side: use grid_size"):
        _ = encoder.num_patches_per_side


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (36, "input size 36×36: 36 is not a multiple of the patch size 8; use 32 or 40"),
        ((32, 60), "60 is not a multiple of the patch size 8; use 56 or 64"),
        (0, "use 8 or 16"),
        ((-8, 8), "use 8 or 16"),
    ],
)
def test_sizes_between_patches(size, message):
    for trunk in (tower_of(), ImageEncoder(tower_of())):
        with pytest.raises(UserError, match=message):
            trunk.set_input_size(size)
        assert trunk.grid == (4, 4)
