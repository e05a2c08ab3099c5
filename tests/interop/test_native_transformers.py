"""Models of images of any shape: our own folders, and transformers' Siglip2 in and out, on pictures from 1:8 to 8:1."""

import json
from dataclasses import replace

import pytest
import torch
from native_pictures import pictures
from safetensors.torch import load_file
from small_bundles import small_bundle
from transformers_models import refused, save_theirs

import contrastive
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.interop.export import export
from contrastive.interop.formats.transformers_preprocess import FILE
from contrastive.models import ClassifierConfig, ImageClassifier
from contrastive.patches import Patches

PATCHES = 24


@pytest.fixture(scope="module", params=["Siglip2Model", "Siglip2VisionModel"])
def theirs(request, tmp_path_factory):
    """A model of theirs with its image processor, and its folder."""
    from transformers import Siglip2ImageProcessor

    folder = tmp_path_factory.mktemp("theirs")
    model = save_theirs(folder, request.param)
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=PATCHES)
    processor.save_pretrained(folder)
    return model, processor, folder


def test_a_ragged_batch_and_one_by_one_are_what_siglip2_makes_of_them(theirs):
    model, processor, folder = theirs
    bundle, images = contrastive.load(folder), pictures()
    assert bundle.config.image.native and bundle.preprocess.config.patches == PATCHES
    made = processor(images, return_tensors="pt")
    patches = bundle.preprocess(images)
    assert torch.equal(patches.grids, made["spatial_shapes"])
    own = patches.mask
    torch.testing.assert_close(patches.values[own], made["pixel_values"][:, : own.shape[1]][own], rtol=0, atol=1e-6)
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tower(**made).pooler_output, dim=-1)
        alone = torch.cat([bundle.model.encode_image(bundle.preprocess([image])) for image in images])
        ragged = bundle.model.encode_image(patches)
    assert (ragged - expected).abs().max() < 1e-5 and (alone - expected).abs().max() < 1e-5
    assert (expected[0] - expected[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_an_encoder_gives_their_tokens_of_what_their_processor_makes(theirs):
    model, processor, folder = theirs
    made = processor(pictures(), return_tensors="pt")
    own, last = made["pixel_attention_mask"].bool(), contrastive.load_image_encoder(folder, layer=-1, norm=True)
    found = last(Patches(made["pixel_values"], made["spatial_shapes"]), fmt="packed")
    expected = getattr(model, "vision_model", model)(**made).last_hidden_state[own]
    torch.testing.assert_close(found.tokens, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.lengths, own.sum(dim=1)) and torch.equal(found.grids, made["spatial_shapes"])
    assert torch.equal(last(last.preprocess(pictures()), fmt="packed").grids, found.grids)


def test_a_round_trip_is_equal_to_the_bit(theirs, tmp_path):
    folder = theirs[2]
    done = export(folder, "transformers", tmp_path / "back")
    assert {check.what for check in done.checks} >= {"image embeddings", "pixels"}
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    if "logit_scale" not in after:  # a tower alone, whose keys the library reads with its prefix too
        after = {name.removeprefix("vision_model."): tensor for name, tensor in after.items()}
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert contrastive.load(tmp_path / "back").preprocess.config == contrastive.load(folder).preprocess.config


def test_ours_out_and_in_again(tmp_path):
    """Weights, patches, and a tokenizer that AutoTokenizer takes for Gemma's."""
    bundle = small_bundle("native")
    done = export(bundle, "transformers", tmp_path / "out")
    assert any("load this one by PreTrainedTokenizerFast" in note for note in done.notes)
    assert any("patch_size=8, max_num_patches=20" in note for note in done.notes)
    again, texts = contrastive.load(tmp_path / "out"), ["a cat", "two dogs"]
    assert again.preprocess.config == bundle.preprocess.config and again.config.image == bundle.config.image
    assert torch.equal(again.tokenizer(texts), bundle.tokenizer(texts))
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bundle.model.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PreTrainedTokenizerFast.from_pretrained" in card and "aspect kept, 20 patches at most, bilinear" in card


def test_a_source_without_its_processor_is_checked_on_noise_of_several_grids(copied, tmp_path):
    done = export(copied("Siglip2VisionModel"), "transformers", tmp_path / "out")
    assert [check.what for check in done.checks] == ["image embeddings"] and not (tmp_path / "out" / FILE).exists()
    assert [note.partition(", so ")[2] for note in done.notes] == [f"{FILE} was left out"]


def test_our_own_folder(tmp_path):
    bundle, images = small_bundle("native"), pictures()[3:5]

    def saved(name, change=lambda description: None):
        def fill(folder):
            save_model(folder, bundle.model.state_dict(), bundle.config, bundle.preprocess.config, bundle.tokenizer)
            description = json.loads((folder / "config.json").read_text())
            change(description)
            (folder / "config.json").write_text(json.dumps(description))

        write_folder(tmp_path / name, fill)
        return tmp_path / name

    again = contrastive.load(saved("whole"))
    assert again.preprocess.config == bundle.preprocess.config
    with torch.no_grad():
        found, expected = (each.model.encode_image(each.preprocess(images)) for each in (again, bundle))
    assert torch.equal(found, expected)
    other = saved("patch", lambda description: description["preprocess"].update(patch_size=16))
    refused(other, "patch_size 16 and model.image.patch_size 8: set both alike")
    other = saved("square", lambda description: description["model"]["image"].update(native=False))
    refused(other, "resize 'native'.*image tower of squares: set model.image.native true")
    config = ClassifierConfig(replace(bundle.config.image, native=False), num_classes=2)
    with pytest.raises(UserError, match="image tower of squares"):
        save_model(tmp_path, ImageClassifier(config).state_dict(), config, bundle.preprocess.config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 16}, "patch_size is 16, but the model's weights are of patches of 8: set it to that"),
        ({"max_num_patches": 20_000}, "preprocess patches 20000: an image has 1 to 16,384"),
        ({"max_num_patches": 2.5}, "max_num_patches is 2.5: it has to be a whole number above 0"),
        ({"resample": 0}, r"resample is 0: it has to be 2 \(bilinear\) or 3"),
        ({"do_resize": False}, "do_resize false"),
    ],
)
def test_a_processor_that_contradicts_the_weights_is_one_line(options, words, copied):
    folder = copied("Siglip2VisionModel")
    (folder / FILE).write_text(
        json.dumps({"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, **options})
    )
    with pytest.raises(UserError, match=words) as caught:
        contrastive.load(folder).preprocess(pictures()[0])
    assert "\n" not in str(caught.value) and FILE in str(caught.value)


def test_what_siglip2_cannot_hold_is_named(tmp_path):
    bundle = small_bundle("native")
    square = replace(bundle, preprocess=Preprocess(PreprocessConfig(32)))
    with pytest.raises(UserError, match="Siglip2Model takes images of any shape.*'squash': give the bundle"):
        export(square, "transformers", tmp_path / "out")
    with pytest.raises(UserError, match="SiglipModel takes images of one size.*'native': give the bundle"):
        export(replace(small_bundle("siglip"), preprocess=bundle.preprocess), "transformers", tmp_path / "out")
    for kind, name in (("clip", "CLIPModel"), ("classifier", "Siglip2VisionModel")):
        other = small_bundle(kind)
        config = replace(other.config, image=replace(other.config.image, native=True))
        model = type(other.model)(config)
        with pytest.raises(UserError, match=f"cannot be written as {name}: .*export it --to onnx"):
            export(replace(other, model=model, config=config), "transformers", tmp_path / "out")
