"""Classifiers from scratch: they learn, go on exactly, and say what is wrong with labels and options."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import contrastive
from contrastive.config import to_dict
from contrastive.data.order import MixtureOrder
from contrastive.data.order_choice import order_for
from contrastive.data.preprocess import Preprocess, PreprocessConfig
from contrastive.data.settings import LabelledDataConfig
from contrastive.data.sources import open_source
from contrastive.data.sources.subset import labelled_share
from contrastive.errors import UserError
from contrastive.evaluate.classification import classification
from contrastive.log import read_metrics
from contrastive.models import ClassifierConfig, ImageClassifier, ImageTowerConfig
from contrastive.optim import MuonConfig
from contrastive.train.classify import (
    Mixing,
    TrainClassifierConfig,
    num_classes,
    open_data,
    parameter_rows,
    train_classifier,
)
from contrastive.train.options import CheckpointConfig, EvaluationConfig, TrainConfig
from contrastive.train.run import command

IMAGE = ImageTowerConfig(
    width=32, depth=2, num_heads=2, mlp_dim=64, pool="class", class_token=True, activation="gelu", dropout=0.1
)


@pytest.fixture
def config(tmp_path):
    return TrainClassifierConfig(
        run_folder=str(tmp_path / "run"),
        model=ClassifierConfig(IMAGE),
        patch_size=2,
        data=LabelledDataConfig(train="digits", bad_window=100),
        optimizer=MuonConfig(lr=3e-3),
        train=TrainConfig(steps=60, global_batch_size=64),
        evaluation=EvaluationConfig(every=60),
        checkpoint=CheckpointConfig(every=10, keep=9),
    )


def test_learns_and_leaves_a_classifier(config, tmp_path):
    image = replace(IMAGE, dropout=0.0)
    longer = {"train": replace(config.train, steps=120), "evaluation": EvaluationConfig(every=120)}
    assert train_classifier(replace(config, model=ClassifierConfig(image), **longer))
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    assert train[0]["loss"] == pytest.approx(2.3026, abs=1e-3)  # the head starts at zero
    assert 0 <= train[-1]["accuracy"] <= 100
    (evaluation,) = [row for row in rows if row["kind"] == "eval"]
    assert evaluation["classification/digits:test/acc1"] > 80
    bundle = contrastive.load(run)
    assert isinstance(bundle.model, ImageClassifier) and bundle.tokenizer is None
    assert bundle.class_names[7] == "seven" and bundle.config.image.image_size == 8  # the scans are 8 x 8
    result = classification(bundle, open_source("digits:test"), device="cpu")
    assert result["acc1"] == pytest.approx(evaluation["classification/digits:test/acc1"])
    assert json.dumps(result) and result["chance"] == 10
    with pytest.raises(UserError, match="has no text tower: zero-shot"):
        bundle.check_text_tower("zero-shot needs one")


def test_the_words_as_they_are_typed(tmp_path, monkeypatch, capsys):
    from contrastive.commands import classifier_command

    seen = []
    monkeypatch.setattr("contrastive.train.classify.train_classifier", lambda config: not seen.append(config))
    for words in ("--model base --num_epochs 10 --batch_size 32", "--model base --num-epochs 10 --batch-size 32", ""):
        classifier_command.main(words.split())
        assert to_dict(seen[-1]) == to_dict(seen[0])
    asked = seen[0].model.image.width, seen[0].train.epochs, seen[0].train.global_batch_size, seen[0].data.train
    assert asked == (768, 10, 32, "digits") and seen[0].patch_size == 2
    classifier_command.main(["--data", "other"])
    assert seen[-1].patch_size is None and "patch_size of classifier.yaml left aside" in capsys.readouterr().err


def test_an_epoch_ends_with_what_training_and_evaluation_say(config, tmp_path, capsys):
    train, data = replace(config.train, steps=None, epochs=2), replace(config.data, eval=("digits:test",))
    small = ClassifierConfig(replace(IMAGE, width=8, depth=1, mlp_dim=8))
    assert train_classifier(replace(config, model=small, train=train, data=data, evaluation=EvaluationConfig(limit=9)))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Epoch [")]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] != "bad_samples"]
    scores = [row["classification/digits:test/acc1"] for row in rows if row["kind"] == "eval"]
    for number, (line, score) in enumerate(zip(told, scores, strict=True), 1):
        assert line.startswith(f"Epoch [{number}/2]  loss 2.") and f"digits:test acc@1 {score:.1f} %" in line
        assert "accuracy" in line and ("left" in line) == (number == 1)


def test_goes_on_exactly(config, tmp_path):
    """With dropout, mixup, CutMix and micro-batches, all of which draw random numbers."""
    config = replace(config, mixup=0.2, cutmix=1.0, label_smoothing=0.1)
    config = replace(config, train=replace(config.train, steps=20, accumulate=2, ema_decay=0.9))
    assert train_classifier(config)
    again = replace(config, run_folder=str(tmp_path / "again"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000020")
    assert train_classifier(replace(again, resume=True))
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_give_the_gradient_of_the_batch(config, tmp_path):
    model = replace(config.model, image=replace(IMAGE, dropout=0.0))
    one = replace(config, model=model, train=replace(config.train, steps=3))
    assert train_classifier(one)
    two = replace(one, run_folder=str(tmp_path / "two"), train=replace(one.train, accumulate=4))
    assert train_classifier(two)
    first, second = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        for name in ("run", "two")
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_mixing_keeps_the_sum_of_the_labels():
    pixels, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 3
    assert Mixing(0, 0, 3)(pixels, labels) == (pixels, labels)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        mixed, targets = Mixing(0.4, 1.0, 3)(pixels, labels)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        untouched = (mixed == pixels).flatten(1).float().mean(dim=1)
        seen.add("cutmix" if 0 < untouched.min() < 1 else "mixup")
    assert seen == {"cutmix", "mixup"}


def test_the_parameter_table_adds_up(config):
    model = ImageClassifier(ClassifierConfig(replace(IMAGE, image_size=8, patch_size=1), num_classes=10))
    *parts, total = parameter_rows(model)
    assert total[3] == sum(times * count for *_, times, count in parts) == sum(p.numel() for p in model.parameters())
    assert ("head", "10", 1, 330) in parts and parts[2][:3] == (f"{IMAGE.depth} blocks", "65 x 32", IMAGE.depth)


def test_held_out_folders_of_a_part_of_the_classes_keep_their_labels(config, tmp_path):
    for split, names in (("train", ("9", "10", "11")), ("val", ("10", "09")), ("other", ("9", "12"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (int(name), 0, 0)).save(tmp_path / split / name / "1.png")
    data = LabelledDataConfig(train=str(tmp_path / "train"), eval=(str(tmp_path / "val"),))
    train, (val,), _ = open_data(replace(config, data=data))
    assert train.class_names == val.class_names == ("9", "10", "11")
    assert {val[i].key: val.label(i) for i in range(2)} == {"09/1.png": 0, "10/1.png": 1}
    with pytest.raises(UserError, match="other has 2 classes, but .*train has 3; none of these: '12'"):
        open_data(replace(config, data=replace(data, eval=(str(tmp_path / "other"),))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": LabelledDataConfig(train="digits", eval=("scenes:test",))}, "scenes:test has 64 classes, but digits"),
        ({"model": ClassifierConfig(IMAGE, num_classes=7)}, "model.num_classes is 7, but digits:train has 10"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"patch_size": 3, "image_size": 8}, "image_size 8 is not a multiple of"),
        ({"image_size": 0}, "image_size is 0"),
        ({"train": TrainConfig(steps=1, global_batch_size=4096)}, "larger than 'digits:train'"),
    ],
)
def test_bad_options_are_one_line(config, changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train_classifier(replace(config, **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_number_of_classes_of_data_without_names():
    unnamed = SimpleNamespace(name="t.csv", class_names=None)
    assert num_classes(unnamed, 3) == 3
    with pytest.raises(UserError, match="t.csv has no class names: put a classnames.txt beside the data"):
        num_classes(unnamed, None)
    for too_few in (1, 0, -3):
        with pytest.raises(UserError, match=f"model.num_classes is {too_few}; a classifier needs two at least"):
            num_classes(unnamed, too_few)


def test_a_share_of_a_mixture_keeps_the_weights():
    mixture = labelled_share(open_source("digits:train=9,digits:test=1"), 0.1)
    assert mixture.weights == (9, 1) and isinstance(order_for(mixture, 16, 0), MixtureOrder)
    assert len(mixture) == sum(len(part) for part in mixture.parts) < 200 and mixture.class_names[7] == "seven"


def test_scores_are_float32_and_evaluation_is_whatever_the_precision_of_the_run():
    torch.manual_seed(0)
    image = replace(IMAGE, image_size=8, patch_size=2)
    model = ImageClassifier(ClassifierConfig(image, num_classes=10, unit_features=True)).eval()
    torch.nn.init.normal_(model.head.weight, std=10)
    bundle = SimpleNamespace(model=model, preprocess=Preprocess(PreprocessConfig(image_size=8)))
    test = open_source("digits:test")
    first = classification(bundle, test, device="cpu", limit=50)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as Accelerate wraps it
    assert classification(bundle, test, device="cpu", limit=50)["loss"] == first["loss"]
    pixels = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.encode_image(pixels)
        scores = model(pixels)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, features @ model.head.weight.T)


def test_the_name_of_a_preset_given_again_changes_nothing_on_resume(tmp_path):
    run, file, seen = tmp_path / "run", tmp_path / "file.yaml", []
    file.write_text("model: {name: tiny, image: {dropout: 0.1}}\ntrain: {steps: 1}\n")
    words = {"name": "p", "doc": "d", "default_recipe": str(file), "shown": ""}

    def stopped(config):
        seen.append(config)
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(to_dict(replace(config, resume=False))))
        return True

    for more in ((), ("--resume",)):
        command(TrainClassifierConfig, stopped, ["--model", "tiny", "--run_folder", str(run), *more], **words)
    first, second = map(to_dict, seen)
    assert second == {**first, "resume": True} and second["model"]["image"]["dropout"] == 0.1


def test_labels_out_of_range_stop_the_run_and_are_named(config, tmp_path, monkeypatch):
    from contrastive.data.sources.arrays import Digits

    monkeypatch.setattr(Digits, "label", lambda self, index: 10 if index % 2 else int(self._labels[index]))
    with pytest.raises(UserError, match=r"bad_label \(digits-"):
        train_classifier(config)


def test_what_needs_a_text_tower_says_so_of_a_classifier(config):
    from contrastive.evaluate.classification import zero_shot
    from contrastive.evaluate.retrieval import retrieval

    model = ImageClassifier(ClassifierConfig(replace(IMAGE, image_size=8, patch_size=2), num_classes=10))
    bundle = SimpleNamespace(model=model, tokenizer=None, preprocess=None)
    with pytest.raises(UserError, match="the model has no text tower, which zero-shot classification needs"):
        zero_shot(bundle, open_source("digits:test"), device="cpu")
    with pytest.raises(UserError, match="has no text tower, which retrieval needs"):
        retrieval(bundle, open_source("scenes:val"), device="cpu")
