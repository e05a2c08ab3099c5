"""Scores of generated captions: against figures worked out by hand, and end to end with a decoder that knows all."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.sources import open_source
from contrastive.data.sources.scenes import Scenes
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.evaluate import captioning
from contrastive.evaluate.captioning import caption_scores, share_named
from contrastive.models import ImageTower, ImageTowerConfig
from contrastive.models.caption_decoder import CaptionDecoder, CaptionDecoderConfig


def test_bleu_by_hand():
    # Of 5 words 4, of 4 pairs 3, of 3 triples 2, of 2 quadruples 1 are in the reference, which is one word longer.
    found = caption_scores(["a red star is here", "x"], [["a red star is there too"], ["x"]])
    counts = (5 / 6) * (3 / 4) * (2 / 3) * (1 / 2)  # with the second caption's one word
    assert found["bleu4"] == pytest.approx(100 * counts**0.25 * math.exp(1 - 7 / 6), rel=1e-6)


def test_cider_of_references_themselves_and_of_nothing_shared():
    texts = ["a red star on the left side", "two blue rings far away here", "One, green heart; in the middle!"]
    assert caption_scores(texts, [[text] for text in texts])["cider"] == pytest.approx(1000)
    assert caption_scores(["q w e r", "t y u i", ""], [[text] for text in texts])["cider"] == 0
    # Case and punctuation are no words.
    upper = [text.upper() + "." for text in texts]
    assert caption_scores(upper, [[text] for text in texts])["cider"] == pytest.approx(1000)


def test_a_class_is_named_by_all_its_words_and_no_others():
    names = ("red star", "red ring", "blue star")
    captions = ["A star that is red.", "a big red star", "a red star and a ring", "a star", "a red heart", "blue star"]
    right = [share_named([caption], [0], names) for caption in captions]
    assert right == [100, 100, 0, 0, 0, 0]
    assert share_named(captions, [0, 0, 0, 0, 0, 2], names) == 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = train_bpe((text for index in range(200) for text in Scenes().captions(index)), 400, 40)
    image = ImageTowerConfig(image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16)
    tower = SimpleNamespace(image_tower=ImageTower(image, 16))
    tower.modules, tower.eval = tower.image_tower.modules, tower.image_tower.eval
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "context_length", "eos_id", "bos_id")}
    decoder = CaptionDecoder(CaptionDecoderConfig(width=16, depth=1, num_heads=2, mlp_dim=16), 16, **ids)
    return tower, decoder, Preprocess(PreprocessConfig(image_size=32)), tokenizer


def told(monkeypatch, model, say):
    """Have a decoder that says of image `number` what `say` does."""
    decoder, tokenizer = model[1], model[3]

    def generate(_, image, how, numbers):
        assert not decoder.training and image.shape == (len(numbers), 16, 16)
        return decoder.ids(tokenizer([say(number) for number in numbers])), torch.zeros(len(numbers))

    monkeypatch.setattr(captioning, "generate", generate)


def test_a_model_that_tells_the_truth_names_every_class(monkeypatch, model):
    source = Scenes("test", image_size=32, num_samples=64)
    told(monkeypatch, model, lambda number: source.captions(number)[0])
    found = captioning.captioning(*model, source, device="cpu", batch_size=20)
    assert (found["named"], found["seen_named"], found["heldout_named"], found["num_images"]) == (100, 100, 100, 64)
    assert found["bleu4"] == pytest.approx(100)
    assert found["captions"]["test-00000003"] == source.captions(3)[0]
    # One that knows only what training has is wrong exactly in what is held out.
    told(monkeypatch, model, lambda number: "a star" if source.label(number) in source.heldout_labels else "a red ring")
    found = captioning.captioning(*model, source, device="cpu", batch_size=20)
    assert found["heldout_named"] == 0 and 0 < found["named"] < 10


def test_images_are_captioned_by_the_decoder_itself(model):
    written, bad = captioning.caption_images(*model, Scenes("val", 32, 5), captioning.GenerationConfig(), device="cpu")
    assert [one.index for one in written] == list(range(5)) and not bad
    assert all(one.log_likelihood < 0 for one in written)


def test_without_anything_to_compare_with(model, tmp_path, monkeypatch):
    source = open_source("scenes:val")
    source.captions = lambda index: ()
    with pytest.raises(UserError, match="scenes:val has neither captions nor class names to compare"):
        captioning.captioning(*model, source, device="cpu")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        caption_scores(["a"], [["a"]])
