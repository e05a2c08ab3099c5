"""Pixels and ids: open_clip's transform and tokenizers against ours, on photographs and captions."""

import json
import tarfile

import open_clip
import pytest
import torch
from open_clip_folders import SIGLIP_TEXT, TEXT, VISION, clip_config, open_clip_folder, write_config
from PIL import Image

import contrastive
from contrastive.data.captions import clean_text
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.interop.formats.tokenizer_files import read_open_clip_tokenizer as read_tokenizer
from contrastive.interop.formats.tokenizer_files import write_tokenizer

ODD_TEXTS = ["A_b: it&#39;s  5 &amp; 7", "Zürich’s   CAFÉ!", "", "word " * 300, "ﬁne “quotes” …"]


@pytest.fixture(scope="module")
def photographs(shared_data):
    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:24]
        return [Image.open(shard.extractfile(member)).convert("RGB") for member in members]


@pytest.fixture(scope="module")
def captions(shared_data):
    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".json")][:300]
        return [text for member in members for text in json.load(shard.extractfile(member))["captions"]]


# Both resize with weights of few bits, which torch and Pillow round differently: bicubic's large and negative ones
# show at sharp edges. A wrong mode, crop or filter is off by tens of levels.
LEVELS = {"bicubic": 4, "bilinear": 2}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [56, 112])
def test_pixels_of_photographs(interpolation, mode, size, photographs, tmp_path):
    preprocess = {"interpolation": interpolation, "resize_mode": mode, "mean": [0, 0, 0], "std": [1, 1, 1]}
    config = clip_config(vision_cfg=VISION | {"image_size": size})
    open_clip_folder(tmp_path, config, preprocess)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    bundle = contrastive.load(tmp_path)
    ours = torch.stack([bundle.preprocess(image) for image in photographs])
    theirs = torch.stack([transform(image) for image in photographs])
    levels = (ours - theirs).abs().max().item() * 255
    with torch.no_grad():
        one, other = (bundle.model.encode_image(pixels) for pixels in (ours, theirs))
    cosine = (one * other).sum(dim=1).min().item()
    assert round(levels) <= LEVELS[interpolation]
    assert cosine >= 0.9999


def test_defaults_are_open_clips(photographs, tmp_path):
    open_clip_folder(tmp_path, clip_config())
    transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    ours = contrastive.load(tmp_path).preprocess(photographs[0])
    assert (ours - transform(photographs[0])).abs().max() <= 4 / 255 / 0.26


def test_patches_that_do_not_fill_the_image(photographs, tmp_path):
    """SO400M/14 at 384 pixels uses 378 of them."""
    config = clip_config(vision_cfg=VISION | {"image_size": 45})
    theirs = open_clip_folder(tmp_path, config, {"resize_mode": "squash"})
    transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    bundle = contrastive.load(tmp_path)
    with torch.no_grad():
        want = theirs.encode_image(torch.stack([transform(image) for image in photographs]), normalize=True)
        got = bundle.model.encode_image(torch.stack([bundle.preprocess(image) for image in photographs]))
    assert (want * got).sum(dim=1).min() >= 0.9999


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
@pytest.mark.parametrize("length", [5, 32, 77])
def test_clips_tokenizer(clean, length, captions, tmp_path):
    text = TEXT | {"vocab_size": 49_408, "context_length": length}
    text |= {"tokenizer_kwargs": {"clean": clean}} if clean != "lower" else {}
    write_config(tmp_path, clip_config(text_cfg=text))
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    ours = read_tokenizer(
        {"hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": None} | text, tmp_path
    )
    texts = captions + ODD_TEXTS
    assert torch.equal(ours(texts), theirs(texts))


@pytest.mark.parametrize("clean", [None, "whitespace", "lower", "canonicalize"])
def test_tokenizers_of_transformers(clean, captions, tmp_path):
    write_tokenizer(train_bpe(captions, 600, 64), tmp_path)
    text = SIGLIP_TEXT | {"vocab_size": 600, "context_length": 24}
    text["tokenizer_kwargs"] = {} if clean is None else {"clean": clean}
    write_config(tmp_path, clip_config(text_cfg=text))
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    ours = read_tokenizer(text | {"tokenizer_mode": None}, tmp_path)
    texts = captions + ODD_TEXTS
    assert torch.equal(ours(texts), theirs(texts))
    assert ours.clean == {None: "whitespace", "lower": "clip"}.get(clean, clean)


def test_cleaning_is_open_clips(captions):
    from open_clip.tokenizer import get_clean_fn

    for theirs, ours in (("whitespace", "whitespace"), ("lower", "clip"), ("canonicalize", "canonicalize")):
        clean = get_clean_fn(theirs)
        for text in captions[:300] + ODD_TEXTS:
            assert clean_text(text, ours) == clean(text)


def test_the_highest_id_has_to_be_the_end_of_text(captions, tmp_path):
    tokenizer = train_bpe(captions, 600, 12)
    text = SIGLIP_TEXT | {"vocab_size": tokenizer.vocab_size, "pool_type": "argmax"}
    open_clip_folder(tmp_path, clip_config(text_cfg=text, quick_gelu=False))
    contrastive.load(tmp_path)  # without its files nobody knows
    write_tokenizer(tokenizer, tmp_path)
    with pytest.raises(UserError, match=f"set text_cfg.pool_type to 'eos' and eos_id to {tokenizer.eos_id}"):
        contrastive.load(tmp_path)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_tokenizer_that_pads_or_cuts_on_the_left(side, tmp_path):
    """As open_clip does then, and ours cannot."""
    text = SIGLIP_TEXT | {"vocab_size": 320, "context_length": 12}
    write_tokenizer(train_bpe(["a cat and a dog"] * 3, vocab_size=300, context_length=12), tmp_path)
    assert read_tokenizer(vars(open_clip.CLIPTextCfg()) | text, tmp_path)(["a cat"]).shape == (1, 12)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {side: "left"}))
    with pytest.raises(UserError, match=f"tokenizer_config.json has {side} 'left', which open_clip follows"):
        read_tokenizer(vars(open_clip.CLIPTextCfg()) | text, tmp_path)(["a cat"])
