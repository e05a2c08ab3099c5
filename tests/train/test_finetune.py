"""Fine-tuning, WiSE-FT and locked-image tuning of a small pretrained model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import contrastive
from contrastive.data.settings import DataConfig, LabelledDataConfig
from contrastive.data.sources import open_source
from contrastive.errors import UserError
from contrastive.evaluate.classification import zero_shot
from contrastive.files import write_folder
from contrastive.interop.bundle import save_model
from contrastive.log import read_metrics
from contrastive.losses import LOSSES
from contrastive.models import ImageTowerConfig, ModelConfig, TextTowerConfig
from contrastive.train.finetune import FinetuneConfig, WiseFTConfig, _classifier_from, finetune
from contrastive.train.options import CheckpointConfig, EvaluationConfig, TrainConfig
from contrastive.train.pretrain import PretrainConfig, pretrain

IMAGE = ImageTowerConfig(
    image_size=8, patch_size=2, width=32, depth=2, num_heads=2, mlp_dim=64, pool="average", projection=True
)
TEXT = TextTowerConfig(context_length=12, width=16, depth=1, num_heads=2, mlp_dim=32, pool="average")
MODEL = ModelConfig(embed_dim=24, image=IMAGE, text=TEXT)


def pretraining(folder, **changes):
    return PretrainConfig(
        run_folder=str(folder),
        **{
            "model": MODEL,
            "data": DataConfig(train="digits", vocab_size=300),
            "train": TrainConfig(steps=40, global_batch_size=64),
            **changes,
        },
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain(pretraining(folder))
    return folder


@pytest.fixture
def config(pretrained, tmp_path):
    return FinetuneConfig(
        run_folder=str(tmp_path / "tuned"),
        init=str(pretrained),
        data=LabelledDataConfig(train="digits"),
        train=TrainConfig(steps=40, global_batch_size=64),
        evaluation=EvaluationConfig(every=40),
        checkpoint=CheckpointConfig(every=40),
        wise_ft=WiseFTConfig(alphas=(0.0, 0.5, 1.0), eval=("digits:test",)),
    )


def figures(run):
    (row,) = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "eval"]
    return row["classification/digits:test/acc1"]


def test_wise_ft_lies_between_zero_shot_and_fine_tuned(config, pretrained, tmp_path):
    assert finetune(config)
    run, test = tmp_path / "tuned", open_source("digits:test")
    untuned = zero_shot(contrastive.load(pretrained), test, device="cpu")["acc1"]
    curve = json.loads((run / "wise_ft.json").read_text())
    assert [row["alpha"] for row in curve] == [0.0, 0.5, 1.0]
    # The head made from prompts is the zero-shot classifier, and so is what the other data are scored by.
    assert curve[0]["digits:test"] == pytest.approx(untuned) == curve[0]["zero-shot digits:test"]
    assert curve[2]["digits:test"] == pytest.approx(figures(run)) and figures(run) > untuned + 10
    assert (run / "wise_ft.png").stat().st_size > 5000
    tuned = contrastive.load(run / "encoder")  # with the text tower as it was
    assert zero_shot(tuned, test, device="cpu")["acc1"] == pytest.approx(curve[2]["zero-shot digits:test"])
    before, after = (load_file(f / "model.safetensors") for f in (pretrained / "final", run / "encoder"))
    assert all(torch.equal(before[n], after[n]) == (not n.startswith("image_tower")) for n in before)


def test_the_saved_share_of_the_tuned_weights(config, pretrained, tmp_path):
    half = replace(config, wise_ft=WiseFTConfig(alphas=(1.0,), save=0.5), run_folder=str(tmp_path / "half"))
    assert finetune(half) and finetune(replace(config, wise_ft=WiseFTConfig(alphas=())))
    first = load_file(pretrained / "final" / "model.safetensors")
    whole, saved = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("tuned", "half"))
    name = "image_tower.transformer.blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(saved[name], (first[name] + whole[name]) / 2)


def test_a_head_alone(config, pretrained, tmp_path):
    assert finetune(replace(config, tune="head", head="zeros", wise_ft=WiseFTConfig()))
    before, after = (load_file(f / "final" / "model.safetensors") for f in (pretrained, tmp_path / "tuned"))
    names = [name for name in before if name.startswith("image_tower")]
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert after["head.weight"].abs().max() > 0 and not (tmp_path / "tuned" / "wise_ft.json").exists()


def test_a_fine_tuning_goes_on_exactly(config, tmp_path):
    every = replace(config, checkpoint=CheckpointConfig(every=10, keep=9))
    assert finetune(every)
    whole = load_file(tmp_path / "tuned" / "final" / "model.safetensors")
    curve = (tmp_path / "tuned" / "wise_ft.json").read_text()
    for part in ("checkpoints/step-00000030", "checkpoints/step-00000020", "final", "encoder"):
        for file in sorted((tmp_path / "tuned" / part).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "tuned" / part).rmdir()
    assert finetune(replace(every, resume=True))
    again = load_file(tmp_path / "tuned" / "final" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (tmp_path / "tuned" / "wise_ft.json").read_text() == curve


def test_a_classifier_can_be_tuned_again_and_start_a_dual_encoder(config, pretrained, tmp_path):
    assert finetune(config)
    plain = replace(config, wise_ft=WiseFTConfig())
    second = replace(plain, init=str(tmp_path / "tuned"), run_folder=str(tmp_path / "second"))
    assert finetune(second)
    assert not (tmp_path / "second" / "wise_ft.json").exists()  # no text tower, so a head of zeros
    with pytest.raises(UserError, match="has no text tower: --head zero_shot needs one"):
        finetune(replace(second, head="zero_shot", run_folder=str(tmp_path / "third")))
    locked = pretraining(tmp_path / "lit", init_image=str(tmp_path / "tuned"), lock="image")
    assert pretrain(locked)
    tuned, lit = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("tuned", "lit"))
    names = [name for name in tuned if name.startswith("image_tower")]
    assert names and all(torch.equal(tuned[name], lit[name]) for name in names)
    losses = [row["loss"] for row in read_metrics(tmp_path / "lit" / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]  # the text tower learns


def test_pretraining_starts_from_a_model_with_all_that_belongs_to_it(pretrained, tmp_path):
    first = load_file(pretrained / "final" / "model.safetensors")
    # Another architecture in the options: the model's own is taken.
    started = pretraining(
        tmp_path / "more", init=str(pretrained), model=ModelConfig(), train=TrainConfig(steps=1, global_batch_size=32)
    )
    assert pretrain(started)
    step_0 = load_file(tmp_path / "more" / "checkpoints" / "step-00000000" / "model.safetensors")
    assert all(torch.equal(first[name], step_0[name]) for name in first)
    both = [contrastive.load(path).tokenizer(["a photo of a seven"]) for path in (pretrained, tmp_path / "more")]
    assert torch.equal(*both)


def test_going_on_from_a_model_that_was_started_from(pretrained, tmp_path):
    """With a loss that has no bias, and with the flags of the first command given again."""
    ours = replace(MODEL, text=replace(TEXT, dropout=0.1))
    options = {"init": str(pretrained), "model": ours, "loss": LOSSES.get("softmax")()}
    assert pretrain(pretraining(tmp_path / "more", train=TrainConfig(steps=1, global_batch_size=32), **options))
    first = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert first["model"]["init_logit_bias"] is None and first["model"]["text"]["dropout"] == 0.1
    again = replace(ours, image=replace(IMAGE, norm_eps=1e-3), embed_dim=32)
    longer = {**options, "train": TrainConfig(steps=2, global_batch_size=32)}
    with pytest.raises(UserError, match=r"model.embed_dim 32 .*24\); model.image.norm_eps 0.001"):
        pretrain(pretraining(tmp_path / "more", resume=True, **{**longer, "model": again}))
    assert pretrain(pretraining(tmp_path / "more", resume=True, **longer))
    second = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert second["model"] == first["model"] and second["data"] == first["data"]
    assert contrastive.load(tmp_path / "more").model.logit_bias is None


def test_fine_tuning_sees_every_patch(config, pretrained):
    bundle = contrastive.load(pretrained)
    bundle = replace(bundle, config=replace(bundle.config, image=replace(IMAGE, patch_dropout=0.5)))
    model = _classifier_from(bundle, replace(config, head="zeros", dropout=0.2), open_source("digits"))
    assert model.config.image.patch_dropout == 0 and model.config.image.dropout == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lock": "image"}, "--lock image keeps the image tower as it is: say whose"),
        ({"init": "a", "init_image": "b"}, "give --init or --init_image, not both"),
        ({"init": "nowhere"}, "no model at nowhere"),
    ],
)
def test_bad_starts_are_one_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrain(pretraining(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_bad_fine_tunings_are_one_line(config, tmp_path):
    with pytest.raises(UserError, match=r"wise_ft.save is 1.5; each must be from 0 to 1"):
        finetune(replace(config, wise_ft=WiseFTConfig(save=1.5)))
    with pytest.raises(UserError, match="no model to fine-tune: contrastive finetune MODEL"):
        finetune(replace(config, init=""))
    with pytest.raises(UserError, match="layer_decay is 0"):
        finetune(replace(config, optimizer=replace(config.optimizer, layer_decay=0.0)))
    with pytest.raises(UserError, match="dropout is 1.5"):
        finetune(replace(config, dropout=1.5))
    with pytest.raises(UserError, match="wise_ft.eval needs class names, which scenes:val has not"):
        finetune(replace(config, wise_ft=WiseFTConfig(eval=("scenes:val",))))
    with pytest.raises(UserError, match=r"wise_ft.save is 0.5, which needs a head that starts from prompts"):
        finetune(replace(config, head="zeros", wise_ft=WiseFTConfig(save=0.5)))
    with pytest.raises(UserError, match=r"wise_ft.eval is digits:test, which needs a head that starts from prompts"):
        finetune(replace(config, head="zeros"))
    assert not (tmp_path / "tuned").exists()


def test_a_start_that_has_changed_is_refused_on_resume(config, pretrained, tmp_path):
    every = replace(config, checkpoint=CheckpointConfig(every=10), init=str(tmp_path / "model"))
    shutil.copytree(pretrained / "final", tmp_path / "model")
    assert finetune(every)
    key = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())["init_key"]
    other = contrastive.load(tmp_path / "model")
    weights = other.model.state_dict()
    weights["logit_scale"] = weights["logit_scale"] + 0.1
    shutil.rmtree(tmp_path / "model")
    write_folder(
        tmp_path / "model",
        lambda folder: save_model(folder, weights, other.config, other.preprocess.config, other.tokenizer),
    )
    with pytest.raises(UserError, match="is not the model that .* started from: its weights have changed"):
        finetune(replace(every, resume=True, init_key=key))


def test_held_out_data_without_labels_are_refused_at_the_start(config, tmp_path):
    with pytest.raises(UserError, match="data.eval scenes:train has no class labels"):
        finetune(replace(config, data=replace(config.data, eval=("scenes:train",))))
    assert not (tmp_path / "tuned").exists()


def test_fine_tuning_at_another_size(config, tmp_path):
    """The classifier, the dual encoder beside it and what it is scored with are all of that size."""
    large = replace(config, image_size=12, train=TrainConfig(steps=2, global_batch_size=64))
    assert finetune(replace(large, evaluation=EvaluationConfig(every=2), wise_ft=WiseFTConfig((1.0,))))
    for folder in (tmp_path / "tuned", tmp_path / "tuned" / "encoder"):
        bundle = contrastive.load(folder)
        assert bundle.preprocess.config.size == (12, 12) and bundle.model.image_tower.grid == (6, 6)
    with pytest.raises(UserError, match="13 is not a multiple of the patch size 2; use 12 or 14"):
        finetune(replace(large, run_folder=str(tmp_path / "odd"), image_size=13))
