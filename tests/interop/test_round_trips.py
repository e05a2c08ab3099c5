"""Across libraries and back: a model that transformers made goes through ours and open_clip's folders unchanged."""

from dataclasses import replace

import pytest
import torch
from small_bundles import CAPTIONS

import contrastive
from contrastive.data.preprocess import Preprocess
from contrastive.data.tokenizer import train_bpe
from contrastive.interop.export import export
from contrastive.interop.formats.tokenizer_files import write_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = 12
SIZES = ((21, 7), (40, 8), (45, 9))  # image, patch


def tokenizer():
    return train_bpe(CAPTIONS, vocab_size=300, context_length=LENGTH)


def made_by_transformers(family, image_size, patch_size, folder):
    """Write a folder by the library itself, weights far from their start; return its model."""
    import transformers

    torch.manual_seed(image_size)
    vision = {**SHAPE, "image_size": image_size, "patch_size": patch_size}
    own = tokenizer()
    text = {**SHAPE, "vocab_size": own.vocab_size, "max_position_embeddings": LENGTH}
    text |= {"eos_token_id": own.eos_id, "bos_token_id": own.bos_id, "pad_token_id": own.pad_id}
    if family == "siglip":
        text["projection_size"] = 32
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
        square = {"height": image_size, "width": image_size}
        processor = transformers.SiglipImageProcessor(size=square, resample=3)
    else:
        text["eos_token_id"] = own.eos_id
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
        model = transformers.CLIPModel(config)
        sides = {"height": image_size, "width": image_size}
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=sides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_tokenizer(own, folder)
    return model.eval()


def inputs(image_size):
    torch.manual_seed(1)
    return torch.randn(3, 3, image_size, image_size), tokenizer()(["a photo of a cat", "two dogs", "a red circle"])


def embeddings(model, pixels, tokens):
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(tokens)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_transformers_to_ours_to_open_clip_and_all_the_way_back(family, image_size, patch_size, tmp_path):
    theirs = made_by_transformers(family, image_size, patch_size, tmp_path / "theirs")
    pixels, tokens = inputs(image_size)
    with torch.no_grad():
        out = theirs(pixel_values=pixels, input_ids=tokens)
    expected = out.image_embeds, out.text_embeds

    ours = contrastive.load(tmp_path / "theirs")
    export(ours, "open_clip", tmp_path / "open_clip")  # which open_clip itself checks
    after = contrastive.load(tmp_path / "open_clip")
    assert equal(ours.model.state_dict(), after.model.state_dict())
    for bundle in (ours, after):
        for found, wanted in zip(embeddings(bundle.model, pixels, tokens), expected, strict=True):
            assert (found - wanted).abs().max() < 1e-5
    # They differ in where an odd number of pixels is cut off, and the writer says so.
    assert replace(after.preprocess.config, cut=ours.preprocess.config.cut) == ours.preprocess.config
    texts = [*CAPTIONS, "Another, longer than twelve ids: " * 5]
    assert torch.equal(after.tokenizer(texts), ours.tokenizer(texts)) and torch.equal(
        ours.tokenizer(texts), tokenizer()(texts)
    )

    export(after, "transformers", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back")
    assert equal(theirs.state_dict(), back.state_dict())


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_resized_positions_stay_as_they_are(family, to, tmp_path):
    """Positions made for 24 pixels, interpolated to 40 and written as such."""
    made_by_transformers(family, 24, 8, tmp_path / "theirs")
    ours = contrastive.load(tmp_path / "theirs")
    ours.model.image_tower.set_input_size(40)
    ours = replace(ours, preprocess=Preprocess(replace(ours.preprocess.config, image_size=40)))
    pixels, tokens = inputs(40)
    expected = embeddings(ours.model, pixels, tokens)
    export(ours, to, tmp_path / "out")
    after = contrastive.load(tmp_path / "out")
    assert after.preprocess.config.size == (40, 40)
    assert equal(ours.model.state_dict(), after.model.state_dict())
    for found, wanted in zip(embeddings(after.model, pixels, tokens), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-5
