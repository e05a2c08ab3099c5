"""The same place in two views, and the pointing game: right maps, maps of noise, and the model's own."""

import math

import numpy as np
import pytest
import torch
from small_model import save_small_model

import contrastive
from contrastive.data.record import Record, Source
from contrastive.data.sources.scenes import Scenes
from contrastive.errors import UserError
from contrastive.evaluate import localisation
from contrastive.evaluate.evaluated_model import EvaluatedModel
from contrastive.evaluate.localisation import Correspondence, Pointing, View, draw_view, pointing_maps
from contrastive.models.image_tower import ImageTower, ImageTowerConfig
from contrastive.visualize.representations import patch_embeddings, reading_attention, trace


class Places(Source):
    """Pictures whose red says the row and whose green says the column."""

    name = fingerprint = "places"

    def __len__(self):
        return 30

    def __getitem__(self, index):
        across = np.linspace(0, 255, 64).round().astype(np.uint8)
        image = np.zeros((64, 64, 3), np.uint8)
        image[..., 0], image[..., 1] = across[:, None], across
        mask = np.zeros((64, 64), np.uint8)
        mask[:32] = 1
        return Record(str(index), image, mask=mask)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return contrastive.load(save_small_model(tmp_path_factory.mktemp("dense") / "final"))


@pytest.fixture
def subject(bundle, tmp_path):
    places = Places()
    places.masked = True
    sources = {"places": places, "plain": Places(), "scenes": Scenes("masks", num_samples=80)}
    return EvaluatedModel("model", bundle, tmp_path, device="cpu", sources=sources, batch_size=9)


def by_colour(pixels):
    """(B, 4, 4) unit vectors whose cosine falls with the distance of the patches' mean colours."""
    colours = torch.nn.functional.avg_pool2d(pixels.float(), 8).flatten(2)[:, :2].transpose(1, 2) * math.pi / 510
    return torch.cat([colours.sin(), colours.cos()], dim=2)


def test_features_of_the_place_find_it(subject, monkeypatch):
    monkeypatch.setattr(localisation, "to_tokens", lambda encoder, of, pixels: by_colour(pixels))
    outcome = Correspondence("places").run(subject)
    assert outcome.headline == ("within_1_patch", "within_1_patch_on_objects")
    assert all(figure.value == 100 for figure in outcome.figures.values() if figure.chance < 30)
    assert outcome.figures["within_1_patch"].value == 100 and outcome.figures["same_patch"].value > 95
    assert outcome.figures["same_patch"].chance == pytest.approx(25, abs=1)
    assert set(Correspondence("plain").run(subject).figures) == {"within_1_patch", "same_patch"}


def test_features_of_noise_find_it_by_chance(subject, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(localisation, "to_tokens", lambda encoder, of, pixels: torch.randn(len(pixels), 4, 8))
    figure = Correspondence("places").run(subject).figures["same_patch"]
    assert figure.value == pytest.approx(figure.chance, abs=12)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_views_places_are_where_its_pixels_come_from(mirrored):
    picture = torch.from_numpy(Places()[0].image).permute(2, 0, 1)
    view = View(10, 24, 40, 32, mirrored)
    seen = view.of(picture, "bicubic").float()
    places = view.places((8, 8), (64, 64)).unflatten(0, (8, 8))
    for row in range(8):
        for column in range(8):
            colour = seen[:2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean(dim=(1, 2))
            expected = (places[row, column] * 8 + 3.5) * 255 / 63
            assert (colour - expected).abs().max() < 6


def test_views_keep_their_share():
    views = [draw_view(100, 60, (0.3, 0.8), np.random.default_rng(seed)) for seed in range(200)]
    shares = [view.height * view.width / 6000 for view in views]
    assert (
        0.28 < min(shares) < 0.35 and 0.75 < max(shares) < 0.82 and {view.mirrored for view in views} == {True, False}
    )
    assert all(0 <= view.top <= 100 - view.height and 0 <= view.left <= 60 - view.width for view in views)


def centres(subject, texts=True):
    """Maps that are highest where the masks say, in the order in which pictures are read."""
    source, preprocess, at = subject.source("scenes"), subject.bundle.preprocess, iter(range(80))

    def maps(tower, pixels, texts):
        masks = torch.stack([preprocess.mask(source[next(at)].mask) for _ in pixels])
        values = localisation.patch_centres(masks, 8)
        return (values > 0).float(), torch.stack([(values == value).float() for value in range(9)], dim=1)

    return maps


def test_maps_of_the_masks_always_hit(subject, monkeypatch):
    monkeypatch.setattr(localisation, "pointing_maps", centres(subject))
    outcome = Pointing("scenes").run(subject)
    assert [outcome.figures[name].value for name in outcome.headline] == [100, 100]
    assert outcome.headline == ("by_attention", "by_text") and outcome.figures["by_attention"].chance < 100
    assert outcome.details["read_by"] == "the pooling head's probe"


def test_maps_of_noise_hit_by_chance(subject, monkeypatch):
    torch.manual_seed(0)
    noise = lambda tower, pixels, texts: (torch.rand(len(pixels), 4), torch.rand(len(pixels), 9, 4))  # noqa: E731
    monkeypatch.setattr(localisation, "pointing_maps", noise)
    for figure in Pointing("scenes").run(subject).figures.values():
        assert figure.value == pytest.approx(figure.chance, abs=15) and figure.interval[0] < figure.chance


@pytest.mark.parametrize("pool", ["class", "attention", "average"])
def test_maps_are_the_towers_own_whatever_the_blocks(pool, monkeypatch):
    size = {"image_size": 24, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 48}
    torch.manual_seed(0)
    tower = ImageTower(ImageTowerConfig(**size, pool=pool, class_token=pool == "class"), 32).eval()
    torch.nn.init.normal_(tower.position_embedding)
    pixels, texts = torch.randn(3, 3, 24, 24), torch.nn.functional.normalize(torch.randn(5, 32), dim=1)
    with torch.no_grad():
        monkeypatch.setattr(localisation, "BLOCK_ELEMENTS", 1)
        attention, similarity = pointing_maps(tower, pixels, texts)
        seen = trace(tower, pixels)
    expected = reading_attention(tower, seen).mean(dim=1)[:, int(pool == "class") :]
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(
        similarity, torch.einsum("bpe,te->btp", patch_embeddings(tower, seen.patch_tokens), texts)
    )
    assert pointing_maps(tower, pixels, None)[1].shape == (3, 0, 9)


def test_what_cannot_be(subject):
    for task, message in (
        (Pointing("plain"), "plain has no masks, which pointing game needs"),
        (Pointing("places", ignore=(255, 1)), "no patch of its pictures has an object"),
    ):
        with pytest.raises(UserError, match=message):
            task.run(subject)
    with pytest.raises(UserError, match="0 < low <= high <= 1"):
        Correspondence("places", scale=(0.5, 0.2)).check()
    assert set(Pointing("places").run(subject).figures) == {"by_attention"}  # its classes have no names
