"""Heat maps of the words of a sentence."""

import io

import pytest
import torch
from interop.small_bundles import small_bundle
from PIL import Image

from contrastive.errors import UserError
from contrastive.visualize.representations import patch_embeddings
from contrastive.visualize.word_maps import LEAST_SIDE, word_map, words_of

SENTENCE = "two dogs on two beaches"


def png(size=(40, 40)):
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["siglip", "clip", "average", "native"])
def test_a_sentence_is_compared_with_every_patch(kind):
    bundle = small_bundle(kind)
    found = word_map(bundle, png(), SENTENCE)
    images = bundle.preprocess.collate([bundle.preprocess(Image.open(io.BytesIO(png())))])
    with torch.no_grad():
        tower = bundle.model.image_tower
        patches = patch_embeddings(tower, tower.forward_features(images)[:, tower.num_prefix_tokens :])
        cosines = patches[0] @ bundle.model.encode_text(bundle.tokenizer(SENTENCE))[0]
    torch.testing.assert_close(found.cosines.flatten(), cosines)
    assert found.low == pytest.approx(cosines.min().item()) and found.high == pytest.approx(cosines.max().item())


def test_a_word_within_its_sentence_is_what_it_changes():
    bundle = small_bundle("siglip")
    whole, without = (word_map(bundle, png(), text).cosines for text in (SENTENCE, "two dogs on beaches"))
    found = word_map(bundle, png(), SENTENCE, 3)  # the second 'two'
    torch.testing.assert_close(found.cosines, whole - without)
    assert found.low == -found.high
    others = [word_map(bundle, png(), SENTENCE, place) for place in range(5)]
    assert {one.high for one in others} == {found.high}  # colours of two words are to be compared
    assert found.high == pytest.approx(max(one.cosines.abs().max().item() for one in others))


def test_a_word_alone_is_a_text_of_its_own():
    bundle = small_bundle("siglip")
    found = word_map(bundle, png(), SENTENCE, 1, alone=True)
    torch.testing.assert_close(found.cosines, word_map(bundle, png(), "dogs").cosines)
    torch.testing.assert_close(word_map(bundle, png(), "dogs", 0).cosines, found.cosines)  # there is nothing left of it


def test_pictures_have_whole_patches_of_images_of_any_shape():
    found = word_map(small_bundle("native"), png((80, 24)), SENTENCE, 1)
    (rows, columns), (height, width, _) = found.cosines.shape, found.picture.shape
    assert rows < columns and height >= LEAST_SIDE and height * columns == width * rows
    assert found.colours.shape == (1, 256, 3)


def test_what_cannot_be_mapped_is_told():
    bundle = small_bundle("siglip")
    assert words_of("  a  cat ") == ("a", "cat")
    for image, sentence, told in (
        (png(), "", "type a text first"),
        (png(), "cat " * 40, "the model reads 12; shorten it"),
        (b"GIF89a", "a cat", "cannot be read"),
    ):
        with pytest.raises(UserError, match=told):
            word_map(bundle, image, sentence)
