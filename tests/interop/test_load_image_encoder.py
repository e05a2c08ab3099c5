"""`load_image_encoder` on folders of ours and of others, with their preprocessing, and without their libraries."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_model import save_native
from PIL import Image

import contrastive
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import train_bpe
from contrastive.errors import UserError
from contrastive.files import write_folder
from contrastive.interop.bundle import Absent, save_model
from contrastive.interop.encoder import ImageProcessor
from contrastive.models import ClassifierConfig, DualEncoder, ImageClassifier, ImageTowerConfig, ModelConfig
from contrastive.models import TextTowerConfig as Text
from contrastive.models.image_encoder import ImageEncoder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "image-encoder.md"
IMAGE = ImageTowerConfig(image_size=32, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=32)
CLIP = replace(IMAGE, pool="class", class_token=True, pre_norm=True, projection=True)


def save_dual(folder, image=IMAGE, preprocess=None):
    torch.manual_seed(0)
    tokenizer = train_bpe(["a red circle", "a blue star"] * 4, vocab_size=270, context_length=8)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id")}
    text = Text(context_length=8, width=16, depth=1, num_heads=2, mlp_dim=32, **ids)
    config = ModelConfig(embed_dim=16, image=image, text=text)
    preprocess = preprocess or PreprocessConfig(image_size=32)
    weights = DualEncoder(config).state_dict()
    write_folder(folder, lambda to: save_model(to, weights, config, preprocess, tokenizer))
    return folder


def picture(width=50, height=40, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("image", [IMAGE, CLIP])
@torch.no_grad()
def test_our_own_folder(image, tmp_path):
    bundle = contrastive.load(save_dual(tmp_path / "model", image))
    pixels = bundle.preprocess(picture())[None]
    encoder = contrastive.load_image_encoder(tmp_path / "model")
    assert isinstance(encoder, contrastive.ImageEncoder) and not encoder.training and encoder.config.layer == -2
    assert torch.equal(encoder.preprocess(picture())[None], pixels)
    assert encoder(pixels).shape == (1, 16, 16) and encoder(pixels, fmt="NCHW").shape == (1, 16, 4, 4)
    pooled = contrastive.load_image_encoder(str(tmp_path / "model"), layer=-1, norm=True, pool="tower")
    expected = bundle.model.encode_image(pixels, normalize=False, project=False)
    torch.testing.assert_close(pooled(pixels), expected, rtol=1e-5, atol=1e-5)
    last = contrastive.load_image_encoder(tmp_path / "model", -1, norm=True, keep_prefix=image is CLIP)
    features = bundle.model.image_tower.forward_features(pixels)
    torch.testing.assert_close(last(pixels), features, rtol=1e-5, atol=1e-5)
    half = contrastive.load_image_encoder(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(pixels).dtype == torch.bfloat16
    assert torch.cosine_similarity(half(pixels).float(), encoder(pixels), dim=-1).min() > 0.999


@torch.no_grad()
def test_a_classifier_folder(tmp_path):
    torch.manual_seed(0)
    config = ClassifierConfig(replace(CLIP, projection=False), embed_dim=16, num_classes=3)
    weights = ImageClassifier(config).state_dict()
    write_folder(tmp_path / "model", lambda to: save_model(to, weights, config, PreprocessConfig(32)))
    bundle = contrastive.load(tmp_path / "model")
    encoder = contrastive.load_image_encoder(tmp_path / "model", -1, norm=True, pool="class")
    pixels = bundle.preprocess(picture())[None]
    expected = bundle.model.encode_image(pixels, normalize=False)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-5)


THEIRS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
THEIRS |= {"image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
@torch.no_grad()
def test_a_folder_of_transformers(family, tmp_path):
    """A vision tower alone, saved without a processor: it loads, and asking for its pixels says what is missing."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}VisionConfig")(**THEIRS)
    model = getattr(transformers, f"{family}VisionModel")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    pixels, prefix = torch.randn(2, 3, 32, 32), int(family == "CLIP")
    hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    encoder = contrastive.load_image_encoder(tmp_path, layer=(0, -2, -1))
    for tokens, layer in zip(encoder(pixels), (0, -2, -1), strict=True):
        torch.testing.assert_close(tokens, hidden[layer][:, prefix:], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        encoder.preprocess(picture())
    encoder.set_input_size(48)
    assert encoder(torch.randn(1, 3, 48, 48))[0].shape == (1, 36, 32), "pixels made elsewhere will do"
    getattr(transformers, f"{family}TextModel")(
        getattr(transformers, f"{family}TextConfig")(**{**THEIRS, "vocab_size": 99, "eos_token_id": 98})
    ).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="has no image tower: there is nothing to encode images with"):
        contrastive.load_image_encoder(tmp_path / "text")


@torch.no_grad()
def test_a_folder_of_timm(tmp_path):
    """Block i of timm is layer i + 1 here; the preprocessing is that of its evaluation transform."""
    import timm

    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    timm.models.save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    pixels = torch.randn(2, 3, 32, 32)
    encoder = contrastive.load_image_encoder(tmp_path, layer=[1, -2], norm=True)
    for tokens, index in zip(encoder(pixels), (0, 1), strict=True):
        theirs = model.get_intermediate_layers(pixels, [index], norm=True)[0]
        torch.testing.assert_close(tokens, theirs, rtol=1e-5, atol=1e-5)


def test_the_processor_under_the_names_that_llava_uses(tmp_path):
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "model"))
    first, second = picture(), picture(24, 60, seed=1)
    processor, pixels = encoder.image_processor, encoder.preprocess(first)
    assert processor is encoder.preprocess and pixels.shape == (3, 32, 32)
    both = processor([first, second], return_tensors="pt")["pixel_values"]
    assert both.shape == (2, 3, 32, 32) and torch.equal(both[0], pixels)
    assert torch.equal(processor.preprocess(first, return_tensors="pt")["pixel_values"][0], pixels)
    assert torch.equal(processor(images=[first, second]), both)
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == 32
    with pytest.raises(TypeError):
        processor.size["shortest_edge"] = 64
    with pytest.raises(UserError, match="'pt' is what there is"):
        processor(first, return_tensors="np")


def test_another_size_changes_the_pixels_too(tmp_path):
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "model"))
    encoder.set_input_size((48, 16))
    expected = Preprocess(PreprocessConfig(image_size=(48, 16)))(picture())
    assert torch.equal(encoder.preprocess(picture()), expected)
    assert encoder.image_processor.crop_size == {"height": 48, "width": 16} == encoder.image_processor.size
    assert encoder(expected[None], fmt="NCHW").shape == (1, 16, 6, 2)
    encoder.set_input_size(64)
    assert encoder.image_processor.config == PreprocessConfig(image_size=64)
    crop = PreprocessConfig(image_size=32, resize="crop", short_side=36)
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "crop", preprocess=crop))
    encoder.set_input_size(64)
    assert encoder.image_processor.config == replace(crop, image_size=64, short_side=72), "the same share is cut off"
    encoder.set_input_size((64, 32))
    assert encoder(torch.zeros(1, 3, 64, 32)).shape == (1, 32, 16)
    with pytest.raises(UserError, match="cannot make 64×32: .*; make the pixels yourself"):
        encoder.preprocess(picture())
    corner = ImageProcessor(Preprocess(PreprocessConfig(image_size=24, short_side=30, cut="corner")))
    assert corner.with_size((32, 32)).config.short_side is None


def test_pixels_of_real_photographs_are_those_of_the_bundle(shared_data, tmp_path):
    folder = save_dual(tmp_path / "model")
    bundle, encoder = contrastive.load(folder), contrastive.load_image_encoder(folder)
    source = open_source(str(shared_data / "flickr8k" / "dev-000000.tar"))
    for position in (0, 7):
        image = source[position].image
        assert torch.equal(encoder.preprocess(image), bundle.preprocess(image))


def test_absent_parts_and_copies(tmp_path):
    processor = ImageProcessor(Absent("MODEL has no preprocessor_config.json"))
    assert processor.with_size((8, 8)) is processor
    for use in (lambda: processor(picture()), lambda: processor.crop_size, lambda: processor.image_mean):
        with pytest.raises(UserError, match="has no preprocessor_config.json"):
            use()
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "model"))
    again = pickle.loads(pickle.dumps(encoder))
    pixels = again.preprocess(picture())[None]
    assert torch.equal(again(pixels), encoder(pixels))


def test_wrong_paths_and_layers(tmp_path):
    folder = save_dual(tmp_path / "model")
    with pytest.raises(UserError, match=r"model: layer -5 is not in an image tower of 3 blocks: use -4 to 3"):
        contrastive.load_image_encoder(folder, layer=-5)
    with pytest.raises(UserError, match="model: pool 'class' needs a tower with a class token"):
        contrastive.load_image_encoder(folder, pool="class")
    with pytest.raises(UserError, match="no model at .*/none"):
        contrastive.load_image_encoder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model at .*/empty"):
        contrastive.load_image_encoder(tmp_path / "empty")


def test_quick_and_light(tmp_path):
    """Beyond torch, the import takes less than two seconds; an encoder of ours needs no other library's code."""
    folder = save_dual(tmp_path / "model")
    heavy = ["transformers", "datasets", "open_clip", "timm", "matplotlib", "sklearn", "accelerate", "pyarrow"]
    code = f"""
import json, sys, time
import torch
start = time.perf_counter()
import contrastive
imported = time.perf_counter()
encoder = contrastive.load_image_encoder({str(folder)!r})
loaded = time.perf_counter()
print(json.dumps([imported - start, loaded - imported, sorted(set({heavy!r}) & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import_seconds, _, found = json.loads(done.stdout)
    assert import_seconds < 2 and found == []
    assert Path(contrastive.__file__).name == "__init__.py"


def test_what_an_image_can_be_and_what_it_cannot(tmp_path):
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "model"), dtype="bfloat16")
    assert encoder.dtype == torch.bfloat16
    file = tmp_path / "picture.png"
    picture().save(file)
    pixels = encoder.preprocess(picture())
    assert torch.equal(encoder.preprocess(str(file)), pixels) and torch.equal(encoder.preprocess(file), pixels)
    batch = encoder.image_processor(images=[picture()], return_tensors="pt").to(torch.bfloat16)
    assert batch.pixel_values.dtype == torch.bfloat16 and batch["pixel_values"].shape == (1, 3, 32, 32)
    for call, message in (
        (lambda: encoder.preprocess(torch.zeros(3, 8, 8)), "a Tensor is not an image: give a PIL image, a path"),
        (lambda: encoder.preprocess([]), "no images"),
        (lambda: encoder(picture()), "not a tensor"),
        (lambda: contrastive.load_image_encoder(tmp_path / "model", dtype="int8"), "dtype has to be"),
        (lambda: contrastive.load_image_encoder(tmp_path / "model", pool="avg"), "Did you mean 'average'"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_crop_comes_back_after_an_oblong_size(tmp_path):
    crop = PreprocessConfig(image_size=32, resize="crop", short_side=36)
    encoder = contrastive.load_image_encoder(save_dual(tmp_path / "model", preprocess=crop))
    encoder.set_input_size((32, 48))
    with pytest.raises(UserError, match="cannot make 32×48"):
        encoder.preprocess(picture())
    encoder.set_input_size(64)
    assert encoder.preprocess(picture()).shape == (3, 64, 64) and encoder.patch_embed.num_patches == 64
    encoder.set_input_size(32)
    assert encoder.image_processor.config == crop
    encoder.preprocess = lambda image: image
    with pytest.raises(UserError, match="your own"):
        encoder.set_input_size(64)
    assert encoder.grid_size == (4, 4)


def test_a_resized_model_is_saved_with_its_size_or_not_at_all(tmp_path):
    bundle = contrastive.load(save_dual(tmp_path / "model"))
    model = bundle.model
    model.image_tower.set_input_size(64)
    preprocess = PreprocessConfig(image_size=64)

    def save(config, name):
        write_folder(
            tmp_path / name, lambda to: save_model(to, model.state_dict(), config, preprocess, bundle.tokenizer)
        )

    with pytest.raises(UserError, match="64 positions.*asks for 16"):
        save(model.config, "wrong")
    save(replace(model.config, image=model.image_tower.config), "right")
    assert contrastive.load(tmp_path / "right").config.image.image_size == 64


def test_the_docs_page_runs_as_it_stands(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    assert code.count("load_image_encoder") == 5
    names = {"torch": torch}
    picture().save(tmp_path / "photo.jpg")
    code = code.replace("photo.jpg", str(tmp_path / "photo.jpg")).replace(
        "runs/mine", str(save_dual(tmp_path / "model"))
    )
    exec(code.replace("runs/native", str(save_native(tmp_path / "native"))), names)
    assert names["tokens"].shape == (1, 16, 16) and names["grid"].shape == (1, 16, 4, 4)
    assert len(names["states"]) == 4 and names["pooled"].shape == (1, 16) and names["batch"].shape == (2, 3, 32, 32)
    assert [x.shape for x in names["last_two"]] == [(1, 16, 4, 4)] * 2
    assert isinstance(names["encoder"], ImageEncoder) and names["encoder"].grid_size == (8, 8)
    assert [part.shape for part in names["prefixes"]] == [(16, 64)] * 2
    assert names["packed"].grids.tolist() == [[4, 4], [2, 8]]
