"""Training that starts from a folder of transformers."""

import json
from dataclasses import replace

import pytest
import torch
from small_bundles import small_bundle
from transformers_models import save_theirs

import contrastive
from contrastive.data.preprocess import PreprocessConfig
from contrastive.data.settings import DataConfig, LabelledDataConfig
from contrastive.errors import UserError
from contrastive.interop.formats import transformers_folder as writing
from contrastive.models import ModelConfig, TextTowerConfig
from contrastive.train.finetune import FinetuneConfig, finetune
from contrastive.train.options import CheckpointConfig, EvaluationConfig, TrainConfig
from contrastive.train.pretrain import PretrainConfig, pretrain

TEXT = TextTowerConfig(context_length=12, width=16, depth=1, num_heads=2, mlp_dim=32)
SHORT = {
    "train": TrainConfig(steps=2, global_batch_size=16),
    "evaluation": EvaluationConfig(every=2, limit=20),
    "checkpoint": CheckpointConfig(every=2),
}
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": 35, "crop_size": 32, "resample": 2}


@pytest.fixture
def vision_tower(tmp_path):
    save_theirs(tmp_path / "theirs", "SiglipVisionModel")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path / "theirs"


def run(folder, **options):
    data = DataConfig(train="digits:train", eval=("digits:test",))
    if "init_image" in options:  # else the text tower and its tokenizer are the model's too
        options |= {"model": ModelConfig(text=TEXT), "data": replace(data, vocab_size=300)}
    return pretrain(PretrainConfig(**{"run_folder": str(folder), "data": data, **SHORT, **options}))


def same_tower(first, second):
    ours, theirs = (bundle.model.image_tower.state_dict() for bundle in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_locked_image_tuning_keeps_tower_and_preprocessing(vision_tower, tmp_path):
    assert run(tmp_path / "run", init_image=str(vision_tower), lock="image")
    start, tuned = contrastive.load(vision_tower), contrastive.load(tmp_path / "run")
    assert same_tower(start, tuned) and tuned.config.embed_dim == 32
    seen = tuned.preprocess.config
    assert seen == start.preprocess.config
    assert (seen.interpolation, seen.short_side, seen.cut, seen.resize) == ("bilinear", 35, "floor", "crop")


def test_fine_tuning_keeps_the_preprocessing(vision_tower, tmp_path):
    data = LabelledDataConfig(train="digits:train", eval=("digits:test",))
    assert finetune(FinetuneConfig(run_folder=str(tmp_path / "run"), init=str(vision_tower), data=data, **SHORT))
    seen = contrastive.load(tmp_path / "run").preprocess.config
    assert seen == contrastive.load(vision_tower).preprocess.config


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_both_towers_and_the_tokenizer_go_on(kind, tmp_path):
    bundle = small_bundle(kind)
    (tmp_path / "theirs").mkdir()
    writing.write(bundle, tmp_path / "theirs", tmp_path / "theirs")
    assert run(tmp_path / "run", init=str(tmp_path / "theirs"), lock="image")
    start, tuned = contrastive.load(tmp_path / "theirs"), contrastive.load(tmp_path / "run")
    assert same_tower(start, tuned) and tuned.preprocess.config == start.preprocess.config
    texts = ["a photo of a cat", "two dogs"]
    assert torch.equal(tuned.tokenizer(texts), bundle.tokenizer(texts))
    if kind == "clip":
        assert tuned.preprocess.config.cut == "floor"
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="logit_bias.*--loss softmax"):  # the default loss is the sigmoid's
            writing.write(tuned, tmp_path / "out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CLIPTextModel", "init_image", "has no image tower: a run starts from"),
        ("CLIPVisionModel", "init", "no text tower: --init starts both towers"),
        ("SiglipModel", "init", "preprocessor_config.json is missing"),
    ],
)
def test_what_is_missing_is_said_before_training(name, options, words, tmp_path):
    save_theirs(tmp_path / "theirs", name)
    if "Vision" in name:
        (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", **{options: str(tmp_path / "theirs")})


def test_a_model_without_its_tokenizer(tmp_path):
    bundle = small_bundle("siglip")
    folder = tmp_path / "theirs"
    folder.mkdir()
    writing.write(bundle, folder, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        run(tmp_path / "run", init=str(folder))
    data = LabelledDataConfig(train="digits:train", eval=("digits:test",))
    assert finetune(FinetuneConfig(run_folder=str(tmp_path / "tuned"), init=str(folder), data=data, **SHORT))
    assert contrastive.load(tmp_path / "tuned").preprocess.config == PreprocessConfig(32)
