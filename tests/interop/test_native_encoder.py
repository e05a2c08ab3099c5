"""`load_image_encoder` of a model of native images: ragged tokens, padded and packed, as of each image by itself."""

import pytest
import torch
from native_model import Shapes, save_native

import contrastive
from contrastive.errors import UserError
from contrastive.patches import Patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_native(tmp_path_factory.mktemp("native") / "model", class_token=True)


@pytest.fixture(scope="module")
def images():
    return [Shapes()[index].image for index in range(8)]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_tokens_are_those_of_each_image_padded_and_packed(folder, images, norm):
    encoder = contrastive.load_image_encoder(folder, layer=(1, -1), norm=norm)
    batch = encoder.preprocess(images)
    padded, packed = encoder(batch), encoder(batch, fmt="packed")
    for many, flat in zip(padded, packed, strict=True):
        assert many.shape == (8, batch.values.shape[1], 32) and flat.lengths.tolist() == batch.lengths.tolist()
        assert torch.equal(flat.tokens, many[batch.mask]) and torch.equal(flat.grids, batch.grids)
        assert not many[~batch.mask].any()
    for row, image in enumerate(images):
        alone = encoder.preprocess(image)[None]
        for many, one, grid in zip(padded, encoder(alone), encoder(alone, fmt="NCHW"), strict=True):
            close(many[row][batch.mask[row]], one[0])
            close(grid[0].flatten(1).T, one[0])
            assert grid.shape[2:] == tuple(alone.grids[0].tolist())
    assert len({tuple(grid) for grid in batch.grids.tolist()}) > 5


@torch.no_grad()
@pytest.mark.parametrize("pool", ["class", "average", "attention", "tower"])
def test_pooled(folder, images, pool):
    encoder = contrastive.load_image_encoder(folder, layer=-1, norm=True, pool=pool)
    batch = encoder.preprocess(images)
    close(encoder(batch), torch.cat([encoder(encoder.preprocess(image)[None]) for image in images]))
    if pool == "tower":
        close(encoder(batch), contrastive.load(folder).model.encode_image(batch, normalize=False, project=False))


@torch.no_grad()
def test_other_libraries_methods_pixels_and_types(folder, images):
    whole = contrastive.load_image_encoder(folder, layer=-1, norm=True)
    made = whole.image_processor(images, return_tensors="pt")
    batch = Patches(made["pixel_values"], made["spatial_shapes"])
    states, last = whole.hidden_states(batch), whole.get_intermediate_layers(batch, n=2, norm=True)
    assert len(states) == 3 and states[0].shape == (8, 1 + batch.values.shape[1], 32)
    close(last[1], whole(batch))
    assert not last[0][~batch.mask].any()
    alone = whole.get_intermediate_layers(batch[1:2].cut(), n=1, norm=True, reshape=True)[0]
    assert alone.shape == (1, 32, *batch.grids[1])
    # Pixels of a shape are its patches.
    pixels = torch.stack([whole.preprocess(images[1]).pixels()] * 2)
    close(whole(pixels), whole(batch)[1, batch.mask[1]].expand(2, -1, -1))
    flat = whole(pixels, fmt="packed")
    close(flat.tokens, whole(pixels).flatten(0, 1))
    assert flat.grids.tolist() == [batch.grids[1].tolist()] * 2
    half = contrastive.load_image_encoder(folder, layer=-1, norm=True, dtype="bfloat16")(batch)
    assert half.dtype == torch.bfloat16 and (half.float() - whole(batch)).abs().max() < 0.2


def test_more_patches_and_what_is_refused(folder, images):
    encoder = contrastive.load_image_encoder(folder)
    encoder.preprocess = encoder.preprocess.with_patches(40)
    batch = encoder.preprocess(images)
    assert 30 < batch.lengths.max() <= 40
    encoder(batch).square().mean().backward()
    assert encoder.position_embedding.grad.abs().sum() > 0
    with pytest.raises(UserError, match=r"images of \d grids .* have no one \(B, D, h, w\)"):
        encoder(batch, fmt="NCHW")
    with pytest.raises(UserError, match="with_patches"):
        encoder.set_input_size(64)
    with pytest.raises(UserError, match="uint8, not normalised"):
        encoder(batch.to(torch.uint8))
    with pytest.raises(UserError, match=r"not \(B, N, 192\)"):
        encoder(encoder.preprocess(images[0]))
