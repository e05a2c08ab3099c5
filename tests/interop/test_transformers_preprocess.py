"""Pixels from a folder's preprocessor_config.json against transformers' own processors, on real photographs."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.data.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, PreprocessConfig
from contrastive.errors import UserError
from contrastive.interop.bundle import Absent
from contrastive.interop.formats.transformers_preprocess import read_preprocess
from contrastive.models import ImageModel, ImageModelConfig, ImageTowerConfig

SQUASH = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}
BILINEAR = {**SQUASH, "resample": 2}
CROP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56}
MODES = {"siglip": SQUASH, "siglip2": BILINEAR, "clip": CROP, "clip-short-side": {**CROP, "size": 61}}
PIL_LEVELS = {"siglip": 12, "siglip2": 4, "clip": 12, "clip-short-side": 12}


@pytest.fixture(scope="module")
def photographs(shared_data):
    with tarfile.open(shared_data / "flickr8k" / "dev-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:40]
        return [Image.open(io.BytesIO(shard.extractfile(member).read())).convert("RGB") for member in members]


def written(folder, options):
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return folder


def their_pixels(options, backend, images):
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pil = {"SiglipImageProcessor": SiglipImageProcessorPil, "CLIPImageProcessor": CLIPImageProcessorPil}
    name = options["image_processor_type"]
    processor = (getattr(transformers, name) if backend == "torchvision" else pil[name])(**options)
    made = [np.asarray(processor(image, return_tensors="np")["pixel_values"][0]) for image in images]
    return torch.from_numpy(np.stack(made)).float()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_photographs_as_the_library_prepares_them(mode, backend, photographs, tmp_path):
    preprocess = read_preprocess(written(tmp_path, MODES[mode]), 56, 8)
    ours = torch.stack([preprocess(image) for image in photographs])
    theirs = their_pixels(MODES[mode], backend, photographs)
    levels = (ours - theirs).abs() * torch.tensor(preprocess.config.std).view(3, 1, 1) * 255
    # The default backend has our kernel; Pillow rounds between its two passes, and takes them in another order.
    assert levels.max() < (0.001 if backend == "torchvision" else PIL_LEVELS[mode]), levels.max()
    assert levels.mean() < 0.02
    torch.manual_seed(0)
    shape = {"width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128}
    tower = ImageModel(ImageModelConfig(64, ImageTowerConfig(image_size=56, patch_size=8, **shape))).eval()
    with torch.no_grad():
        cosines = torch.cosine_similarity(tower.encode_image(ours), tower.encode_image(theirs))
    assert cosines.min() >= 0.9999, cosines.min()


def test_the_other_cut_of_the_centre_is_seen(photographs, tmp_path):
    """What this test file would say if a crop were cut as torchvision does it: pixels of another place."""
    theirs = their_pixels(CROP, "torchvision", photographs)
    rounded = Preprocess(PreprocessConfig(56, resize="crop", mean=CLIP_MEAN, std=CLIP_STD))
    shifted = [(rounded(image) - other).abs().max() > 0.5 for image, other in zip(photographs, theirs, strict=True)]
    assert 0 < sum(shifted) < len(photographs) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PreprocessConfig(56)),
        ({"do_rescale": False}, {"mean": (0.5 / 255,) * 3, "std": (0.5 / 255,) * 3}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"rescale_factor": 1 / 127.5}, {"mean": (0.25,) * 3, "std": (0.25,) * 3}),
        ({"image_mean": 0.5, "image_std": 0.25}, {"std": (0.25,) * 3}),
        ({"image_processor_type": "SiglipImageProcessorFast"}, PreprocessConfig(56)),
        ({"image_mean": 0, "image_std": 1}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"image_mean": [0.5], "image_std": [0.25]}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
        ({"do_normalize": None}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"do_rescale": None}, {"mean": (0.5 / 255,) * 3, "std": (0.5 / 255,) * 3}),
    ],
)
def test_options_of_the_processor(options, expected, tmp_path, photographs):
    given = {**SQUASH, **options}
    found = read_preprocess(written(tmp_path, given), 56, 8).config
    for name, value in (expected if isinstance(expected, dict) else vars(expected)).items():
        assert getattr(found, name) == (pytest.approx(value) if name in ("mean", "std") else value)
    wanted = {name: given[name] for name in ("image_mean", "image_std") if name in given}
    given |= {name: 3 * (value if isinstance(value, list) else [value]) for name, value in wanted.items()}
    given["image_processor_type"] = "SiglipImageProcessor"
    theirs = their_pixels(given, "torchvision", photographs[:3])
    ours = torch.stack([Preprocess(found)(image) for image in photographs[:3]])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_nested_file_of_version_5_and_the_names_of_old_ones(tmp_path):
    from transformers import CLIPImageProcessor

    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": BILINEAR}))
    assert read_preprocess(tmp_path, 56, 8).config == PreprocessConfig(56, interpolation="bilinear")
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56, "resample": 3}
    assert read_preprocess(written(tmp_path, old), 56, 8).config.resize == "crop"
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    expected = PreprocessConfig(56, resize="crop", mean=CLIP_MEAN, std=CLIP_STD, cut="floor")
    assert read_preprocess(tmp_path, 56, 8).config == expected


def test_images_that_patches_do_not_fill(tmp_path, photographs):
    options = {**SQUASH, "size": {"height": 59, "width": 59}}
    preprocess = read_preprocess(written(tmp_path, options), 59, 8)
    theirs = their_pixels(options, "torchvision", photographs[:3])
    ours = torch.stack([preprocess(image) for image in photographs[:3]])
    torch.testing.assert_close(ours, theirs[..., :56, :56], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**SQUASH, "resample": 1}, "resample 1 is not supported"),
        ({**SQUASH, "do_resize": False}, "do_resize false"),
        ({**SQUASH, "size": 56}, "size 56 with do_center_crop False does not give images of one size"),
        ({**SQUASH, "size": {"height": 64, "width": 64}}, "images become 64×64 pixels, but the model takes 56×56"),
        ({**CROP, "crop_size": {"height": 56, "width": 48}}, "images become 56×48"),
        ({**CROP, "size": {"shortest_edge": 48}}, "smaller than crop_size"),
        ({**CROP, "size": {"shortest_edge": 56, "longest_edge": 90}}, "does not give images of one size"),
        ({**SQUASH, "image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported; known: Sig"),
        ({**SQUASH, "image_processor_type": "Siglip2ImageProcessor"}, "keeps the aspect ratio.*interpolation='bilin"),
        ({"size": 56}, "image_processor_type '' is not supported"),
        ({**SQUASH, "image_std": [0.5, 0, 0.5]}, "positive in each channel"),
        ({**SQUASH, "do_resize": None}, "do_resize false .or null. leaves images as large as they are"),
        ({**CROP, "do_center_crop": None}, "do_center_crop False does not give images of one size"),
        ({**SQUASH, "size": None}, "size None with"),
        ({**CROP, "crop_size": None}, "with do_center_crop True does not give images of one size"),
        ({**SQUASH, "resample": None}, "resample None is not supported"),
        ({**SQUASH, "resample": [3]}, "resample .3. is not supported"),
        ({**SQUASH, "image_mean": None}, "image_mean is None: it has to be a number, or three"),
        ({**SQUASH, "image_std": "x"}, "image_std is 'x'"),
        ({**SQUASH, "image_mean": [0.1, 0.2]}, "image_mean is .0.1, 0.2.: it has to be a number, or three"),
        ({**SQUASH, "rescale_factor": None}, "rescale_factor is None: it has to be a number above 0"),
        ({**SQUASH, "rescale_factor": 0}, "rescale_factor is 0"),
        ({**SQUASH, "rescale_factor": "x"}, "rescale_factor is 'x'"),
        (
            {**SQUASH, "size": {"height": "56", "width": "56"}},
            "size is .*'56'.*: it has to be in whole numbers of pixels",
        ),
        ({**CROP, "size": [56]}, "size is .56.: it has to be in whole numbers"),
        ({**CROP, "use_square_size": True}, "use_square_size true is not supported"),
        ({**SQUASH, "image_processor_type": 5}, "image_processor_type is 5: it has to be the name of a class"),
    ],
)
def test_what_cannot_be_done_exactly_is_absent_and_says_why(options, words, tmp_path):
    absent = read_preprocess(written(tmp_path, options), 56, 8)
    assert isinstance(absent, Absent)
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{words}") as caught:
        absent(None)
    assert "\n" not in str(caught.value)


def test_a_nested_file_of_another_type(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": 5}')
    with pytest.raises(UserError, match="processor_config.json: image_processor is 5: it has to be an object"):
        read_preprocess(tmp_path, 56, 8)(None)


def test_a_torn_file_and_none(tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json is missing"):
        read_preprocess(tmp_path, 56, 8).config.size  # noqa: B018
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(UserError, match="preprocessor_config.json is not JSON"):
        read_preprocess(tmp_path, 56, 8)
