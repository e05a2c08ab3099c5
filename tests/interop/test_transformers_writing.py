"""Our models as folders that transformers loads: the same numbers there, and the same weights when they come back."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_bundles import small_bundle
from transformers_models import SHAPES, save_theirs, some_input

import contrastive
from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent, Bundle
from contrastive.interop.export import export
from contrastive.interop.formats import transformers_folder as writing
from contrastive.interop.parity import Probe, own_outputs
from contrastive.interop.parity import probe_image as picture
from contrastive.models import DualEncoder, ImageModel, ImageModelConfig, TextModel, TextModelConfig

IMAGES = [picture(*size) for size in ((64, 48), (50, 80), (96, 96), (61, 47))]
TEXTS = ["two dogs on the beach", "A red circle!", "x", "a photo of a cat " * 20]
WIDER = {"width": 48, "num_heads": 4, "mlp_dim": 40}


def exported(bundle, folder):
    folder.mkdir()
    return writing.write(bundle, folder, folder)


def check_same(bundle, folder):
    """What transformers makes of the folder is what our model says, and so it is when the folder is loaded here."""
    pixels = None if bundle.preprocess is None else torch.stack([bundle.preprocess(image) for image in IMAGES])
    tokens = None if bundle.tokenizer is None else bundle.tokenizer(TEXTS)
    probe = Probe(IMAGES, TEXTS, pixels, tokens)
    ours, theirs = own_outputs(bundle, probe), writing.outputs(folder, probe)
    again = own_outputs(contrastive.load(folder), probe)
    for name, limit in (("image", 1e-5), ("text", 1e-5), ("logits", 1e-4)):  # logits are 10 cosines
        expected = getattr(ours, name)
        for found in (getattr(theirs, name), getattr(again, name)):
            assert (found is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    assert tokens is None or torch.equal(theirs.tokens, tokens)
    return pixels, theirs.pixels


def changed(bundle, image=None, text=None, **options):
    """A model with random weights and other options."""
    config = replace(bundle.config, **options)
    if image is not None:
        config = replace(config, image=replace(config.image, **image))
    if text is not None:
        config = replace(config, text=replace(config.text, **text))
    torch.manual_seed(1)
    model = type(bundle.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return replace(bundle, model=model, config=config)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize(("image_size", "patch_size"), [shape[:2] for shape in SHAPES])
def test_there_and_back(kind, image_size, patch_size, tmp_path):
    bundle = small_bundle(kind, image_size, patch_size)
    bundle = changed(bundle, text=WIDER if kind == "clip" else {"mlp_dim": 40})
    exported(bundle, tmp_path / "out")
    pixels, theirs = check_same(bundle, tmp_path / "out")
    assert kind == "clip" or torch.allclose(pixels, theirs, atol=1e-6)
    back, first = contrastive.load(tmp_path / "out"), bundle.model.state_dict()
    again = back.model.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(back.tokenizer(TEXTS), bundle.tokenizer(TEXTS))
    expected = torch.stack([back.preprocess(image) for image in IMAGES])
    assert torch.allclose(expected, theirs, atol=1e-6)  # the cut of this library, not of ours
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["architectures"] == ["CLIPModel" if kind == "clip" else "SiglipModel"]
    assert content["dtype"] == "float32" and "text_config" in content


@pytest.mark.parametrize("name", ["SiglipModel", "CLIPModel", "SiglipVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize(("image_size", "patch_size", "width"), SHAPES)
def test_from_there_and_back_there(name, image_size, patch_size, width, tmp_path):
    import transformers

    theirs = save_theirs(tmp_path / "first", name, image_size, patch_size, width)
    exported(contrastive.load(tmp_path / "first"), tmp_path / "out")
    model, told = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    first, again = theirs.state_dict(), model.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    pixels, tokens = some_input(image_size)
    given = {"pixel_values": pixels} if "Vision" in name else {"pixel_values": pixels, "input_ids": tokens}
    with torch.no_grad():
        expected, found = theirs(**given), model.eval()(**given)
    assert torch.equal(expected[0], found[0])


@pytest.mark.parametrize(
    ("kind", "image", "text", "note"),
    [
        ("siglip", {"pool": "average"}, {}, "mean over patches"),
        ("siglip", {"pool": "average", "position": "sincos", "patch_bias": False}, {}, "sin-cos positions"),
        ("siglip", {"activation": "gelu", "norm_eps": 1e-5}, {"projection_bias": False}, "text projection, which has"),
        ("siglip", {}, {"projection": False}, "text tower, which has no projection, gets the identity"),
        ("clip", {"patch_bias": True}, {"activation": "gelu"}, "bias of the patch embedding is added to the positions"),
        ("clip", {"position": "sincos"}, {}, "sin-cos"),
        ("clip", {"projection": False, "width": 24}, {"projection": False, "width": 24}, "image tower, which has no"),
    ],
)
def test_parts_in_other_terms_have_the_same_outputs(kind, image, text, note, tmp_path):
    bundle = changed(small_bundle(kind), image, text)
    notes = exported(bundle, tmp_path / "out")
    assert any(note in line for line in notes), notes
    check_same(bundle, tmp_path / "out")


def test_a_mean_comes_back_as_a_mean(tmp_path):
    bundle = changed(small_bundle("siglip"), {"pool": "average"})
    exported(bundle, tmp_path / "out")
    back = contrastive.load(tmp_path / "out")
    assert back.config.image.pool == "average"
    first, again = bundle.model.state_dict(), back.model.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipVisionModel", "CLIPModel"])
def test_patches_that_do_not_fill_the_image(name, tmp_path):
    """As so400m/14 at 384; CLIP with a processor that squashes."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    save_theirs(tmp_path / "first", name, image_size=35)
    size = {"height": 35, "width": 35}
    if name == "CLIPModel":
        CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / "first")
    else:
        SiglipImageProcessor(size=size).save_pretrained(tmp_path / "first")
    bundle = contrastive.load(tmp_path / "first")
    checks = export(bundle, "transformers", tmp_path / "out").checks
    assert {check.what for check in checks} >= {"image embeddings", "pixels"} and all(check.passed for check in checks)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content.get("vision_config", content)["image_size"] == 35
    (tmp_path / "first" / "preprocessor_config.json").unlink()
    notes = export(contrastive.load(tmp_path / "first"), "transformers", tmp_path / "without").notes
    assert any("image_size in config.json is 32, what its patches fill" in line for line in notes)


def test_softmax_logits_get_a_bias_of_zero(tmp_path):
    bundle = changed(small_bundle("siglip"), init_logit_bias=None)
    assert any("get one of zero" in line for line in exported(bundle, tmp_path / "out"))
    check_same(bundle, tmp_path / "out")
    assert contrastive.load(tmp_path / "out").model.logit_bias.item() == 0


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("part", ["image", "text"])
def test_a_tower_alone(kind, part, tmp_path):
    whole = small_bundle(kind)
    config = (ImageModelConfig if part == "image" else TextModelConfig)(
        whole.config.embed_dim, getattr(whole.config, part)
    )
    model = (ImageModel if part == "image" else TextModel)(config).eval()
    getattr(model, f"{part}_tower").load_state_dict(getattr(whole.model, f"{part}_tower").state_dict())
    preprocess, tokenizer = (whole.preprocess, None) if part == "image" else (None, whole.tokenizer)
    bundle = Bundle(model, preprocess, tokenizer, config, whole.path)
    exported(bundle, tmp_path / "out")
    check_same(bundle, tmp_path / "out")
    assert contrastive.load(tmp_path / "out").config.image == config.image if part == "image" else True


def test_a_whole_folder_serves_the_classes_of_its_towers(tmp_path):
    from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

    for kind, model_class in (("siglip", SiglipVisionModel), ("clip", CLIPVisionModelWithProjection)):
        bundle = small_bundle(kind)
        exported(bundle, tmp_path / kind)
        model = model_class.from_pretrained(tmp_path / kind).eval()
        pixels, _ = some_input(32)
        with torch.no_grad():
            out, expected = model(pixel_values=pixels), bundle.model.encode_image(pixels, normalize=False)
        found = out.image_embeds if kind == "clip" else out.pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_auto_classes_and_the_pipeline_use_the_folder_as_it_is(tmp_path):
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

    for kind in ("siglip", "clip"):
        bundle = small_bundle(kind)
        bundle.tokenizer.context_length = 64  # the length that the pipeline pads SigLIP's texts to
        bundle = changed(bundle, text={"context_length": 64})
        folder = tmp_path / kind
        assert not any("pipeline" in line for line in exported(bundle, folder))
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        inputs = processor(text=TEXTS, images=IMAGES, return_tensors="pt")
        assert inputs["input_ids"].shape == (4, 64) and "attention_mask" not in inputs
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 64
        AutoImageProcessor.from_pretrained(folder)
        classify = pipeline("zero-shot-image-classification", model=str(folder))
        scores = {s["label"]: s["score"] for s in classify(IMAGES[0], TEXTS[:3], hypothesis_template="{}")}
        expected = logits[0, :3].sigmoid() if kind == "siglip" else logits[0, :3].softmax(0)
        assert [scores[text] for text in TEXTS[:3]] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "image", "text", "options", "words"),
    [
        (
            "siglip",
            {},
            {"pool": "average"},
            {},
            "cannot be written as SiglipModel: model.text.pool is average, SiglipModel has last; "
            "train it with --model.text.pool last, or export it --to onnx",
        ),
        ("siglip", {"class_token": True}, {"causal": True}, {}, "class_token is true.*causal is true.*no_class_token"),
        ("clip", {"pre_norm": False}, {}, {}, "CLIPModel: model.image.pre_norm is false.*--model.image.pre_norm,"),
        ("clip", {}, {"projection_bias": True}, {}, "text.projection_bias is true, CLIPModel has false"),
        ("clip", {}, {}, {"init_logit_bias": -10.0}, "logit_bias is -9.*--loss softmax"),
        ("clip", {}, {"eos_id": 2}, {}, "end-of-text token is id 2.*highest id of a text"),
    ],
)
def test_what_the_format_lacks_is_named(kind, image, text, options, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        exported(changed(small_bundle(kind), image, text, **options), tmp_path / "out")
    assert "\n" not in str(caught.value) and not any((tmp_path / "out").iterdir())


def test_positions_that_are_no_square_are_refused(tmp_path):
    bundle = small_bundle("siglip")
    bundle.model.image_tower.set_input_size((32, 48))
    with pytest.raises(UserError, match="grid of 4×6, SiglipModel has squares"):
        exported(bundle, tmp_path / "out")


def test_resized_positions_go_along(tmp_path):
    bundle = small_bundle("siglip")
    bundle.model.image_tower.set_input_size(48)
    with pytest.raises(UserError, match="makes 32×32 pixels, the image tower takes 48×48"):
        exported(bundle, tmp_path / "wrong")
    bundle = replace(bundle, preprocess=Preprocess(PreprocessConfig(48)))
    exported(bundle, tmp_path / "out")
    check_same(bundle, tmp_path / "out")
    assert contrastive.load(tmp_path / "out").config.image.image_size == 48


def test_absent_parts_are_left_out_and_said(tmp_path):
    bundle = replace(small_bundle("siglip"), preprocess=Absent("none"), tokenizer=Absent("none"))
    notes = exported(bundle, tmp_path / "out")
    assert sum("left out" in line for line in notes) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    pixels, tokens = some_input(32)
    outputs = writing.outputs(tmp_path / "out", Probe(IMAGES, TEXTS, pixels, tokens))
    assert outputs.pixels is None and outputs.tokens is None and outputs.logits is not None


def test_weights_the_library_does_not_take_are_refused(tmp_path):
    from safetensors.torch import save_file

    exported(small_bundle("siglip"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="SiglipModel does not take .*vision_model.post_layernorm.weight"):
        writing.outputs(tmp_path / "out", Probe(IMAGES, TEXTS, *some_input(32)))


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({"cut": "floor", "resize": "crop", "mean": CLIP_MEAN, "std": CLIP_STD}, None),
        ({"resize": "crop", "short_side": 41, "cut": "floor"}, None),
        ({"interpolation": "bilinear"}, None),
        ({"short_side": 40, "cut": "floor"}, None),
        ({"short_side": 35, "cut": "corner"}, 35),
    ],
)
def test_preprocessing_goes_there_and_back(options, sides, tmp_path):
    bundle = replace(small_bundle("siglip"), preprocess=Preprocess(PreprocessConfig(32, **options)))
    exported(bundle, tmp_path / "out")
    tokens = bundle.tokenizer(TEXTS)
    side = sides or 32
    pixels = writing.outputs(tmp_path / "out", Probe(IMAGES, TEXTS, torch.zeros(1, 3, side, side), tokens)).pixels
    ours = torch.stack([bundle.preprocess(image) for image in IMAGES])
    torch.testing.assert_close(pixels[..., :32, :32], ours, rtol=0, atol=1e-6)
    found = contrastive.load(tmp_path / "out").preprocess
    assert all(torch.equal(found(image), bundle.preprocess(image)) for image in IMAGES)


def test_a_classifiers_tower(tmp_path):
    from contrastive.models import ClassifierConfig, ImageClassifier, ImageTowerConfig

    image = ImageTowerConfig(image_size=32, patch_size=8, width=32, depth=1, num_heads=2, mlp_dim=48, pool="average")
    model = ImageClassifier(ClassifierConfig(image, num_classes=3)).eval()
    bundle = replace(small_bundle("image"), model=model, config=model.config)
    assert any("only the image tower" in line for line in exported(bundle, tmp_path / "out"))
    back = contrastive.load(tmp_path / "out").model
    assert isinstance(back, ImageModel) and not isinstance(back, DualEncoder)
    pixels, _ = some_input(32)
    with torch.no_grad():
        torch.testing.assert_close(back.encode_image(pixels), model.encode_image(pixels))
