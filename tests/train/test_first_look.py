"""The screen that a run begins with: what it shows is what training sees, and it warns of what is wrong alone."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import ACCELERATE, ROOT, environment, pretrain_here, rows
from PIL import Image
from rank_processes import script_on_ranks

from contrastive.commands import classifier_command, finetune_command
from contrastive.config import parse
from contrastive.data.inspection import kind_of_text
from contrastive.train import first_look
from contrastive.train.classify import TrainClassifierConfig
from contrastive.train.finetune import FinetuneConfig
from contrastive.train.pretrain import PretrainConfig

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "wet", "dry", "tall"]
THINGS = ["dog", "cat", "house", "boat", "tree", "car", "bird", "horse", "cup", "chair"]


@pytest.fixture
def look(tiny, tmp_path, capsys, monkeypatch):
    """Look at a source as pretraining on it would; returns the screen on one line, and its warnings."""
    monkeypatch.chdir(tmp_path)

    def screen(*args, run=pretrain_here, config=tiny):
        before = sorted(tmp_path.rglob("*"))
        run("--config", config, "--run_folder", tmp_path / "run", "--dry_run", *args)
        assert sorted(tmp_path.rglob("*")) == before
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("a dry run")
        told = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        return " ".join(" ".join(lines).split()), told

    return screen


def pairs(folder, captions, side=12, image=None):
    """A table of noise images with these captions; `image(number)` makes another picture."""
    rng = np.random.default_rng(0)
    for number in range(len(captions)):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8) if image is None else image(number)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "--data.train", folder / "pairs.jsonl", "--data.eval"


CAPTIONS = [f"a {word} {thing} by the road" for word in WORDS for thing in THINGS]


def test_shows_what_pretraining_learns_from(look, tmp_path):
    screen, told = look(*pairs(tmp_path, CAPTIONS), "digits:test", "--model.text.context_length", 12)
    assert told == []
    assert "data.train" in screen and "pairs.jsonl: 100 samples" in screen and "data.eval digits:test: 355" in screen
    assert "8 steps of 16 samples, 1.28 epochs" in screen
    assert screen.count("the model reads") == 3 and "dog by the road" in screen
    assert "inspected 64, 64 of them readable" in screen and "cut captions 0 (0.0%)" in screen
    assert "duplicate captions 0 of 64" in screen and "duplicate images 0 of 64" in screen
    assert "in a batch of 16 a caption meets 0 identical ones" in screen
    assert f"loss {np.log(16) + 15 * np.log(16 / 15):.3f}" in screen and "acc@1 10 %" in screen


def test_shows_captions_as_stored_and_as_cut_and_cleaned(look, tmp_path):
    captions = [text.replace("a ", "A  ", 1) + " &amp; MORE\n" for text in CAPTIONS]
    screen, told = look(*pairs(tmp_path, captions), "--data.clean", "whitespace", "--model.text.context_length", 7)
    assert r"by the road &amp; MORE\n'" in screen and "by the road &'" not in screen
    assert "cut captions 64 (100.0%) are longer than the context of 7 tokens" in screen
    read = re.findall(r"the model reads '(.*?)'", screen)
    assert len(read) == 3 and all(text.startswith("a ") and "more" not in text and "&" not in text for text in read)
    assert len(told) == 1 and "are the same tokens" in told[0]


def test_class_prompts_and_their_matches(look):
    screen, told = look()
    assert "classes 10: zero, one, two, three, four, ..." in screen and "prompts 'zero', 'the digit zero.'" in screen
    assert "prompts the model reads" in screen and "which count as right too" in screen and told == []
    told = look("--loss.duplicates", "negative")[1]
    assert len(told) == 1 and "--loss.duplicates positive" in told[0]


def test_class_names_that_are_numbers(look, tmp_path):
    for number in range(16):
        (tmp_path / "set" / f"class_{number}").mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"class_{number}" / "a.png")
    screen, told = look("--data.train", tmp_path / "set", "--data.eval", "--model.text.context_length", 40)
    assert len(told) == 1 and "16 of 16 class names look like ids, as 'class_0'" in told[0]


def test_a_classifier_shows_its_classes_and_chance(look, tmp_path):
    config = ROOT / "configs" / "classifier.yaml"
    run = lambda *args: classifier_command.main(list(map(str, args)))  # noqa: E731
    screen, told = look("--data", "digits", run=run, config=config)
    assert "sample digits-" in screen and " class " in screen and "classes 10: zero" in screen
    assert f"loss {np.log(10):.3f}" in screen and "chance on digits:test acc@1 10 %" in screen and told == []
    assert "prompts" not in screen and "the model reads" not in screen
    assert "optimizer.lr 0.1 is" in look("--data", "digits", "--lr", 0.1, run=run, config=config)[1][0]


def test_the_look_changes_nothing_of_a_run(tiny, tmp_path, monkeypatch):
    looked, plain = tmp_path / "looked", tmp_path / "plain"
    pretrain_here("--config", tiny, "--run_folder", looked)
    monkeypatch.setattr(first_look, "first_look", lambda *args, **how: None)
    pretrain_here("--config", tiny, "--run_folder", plain)
    of = [[(row["loss"], row["grad_norm"]) for row in rows(folder)] for folder in (looked, plain)]
    assert of[0] == of[1] and len(of[0]) == 8
    assert "dry_run: false" in (looked / "config.yaml").read_text()


def test_global_random_states_are_left_alone(tiny, tmp_path, monkeypatch):
    inner, states = first_look.first_look, []

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    def watched(*args, **how):
        before = state()
        inner(*args, **how)
        states.append(before == state())

    monkeypatch.setattr(first_look, "first_look", watched)
    monkeypatch.chdir(tmp_path)
    pretrain_here("--config", tiny, "--dry_run", "--data.augment.rand_augment_ops", 2, "--data.augment.flip")
    assert states == [True]


def test_a_resumed_run_says_where_it_stands_alone(tiny, tmp_path, capsys):
    run = ("--config", tiny, "--run_folder", tmp_path / "run")
    pretrain_here(*run, "--train.steps", 4)
    capsys.readouterr()
    pretrain_here(*run, "--resume", "--dry_run")
    told = capsys.readouterr().err
    assert "on from step 4" in told and "the model reads" not in told and "a dry run" in told
    assert len(rows(tmp_path / "run")) == 4


def test_a_dry_run_of_a_folder_that_holds_a_run_is_refused_as_the_run_is(tiny, tmp_path):
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--train.steps", 1)
    with pytest.raises(Exception, match="exists; continue it with --resume"):
        pretrain_here("--config", tiny, "--run_folder", tmp_path / "run", "--dry_run")


def test_finetuning_looks_too(look, tiny, tmp_path, capsys):
    pretrain_here("--config", tiny, "--run_folder", tmp_path / "start", "--train.steps", 1)
    capsys.readouterr()
    run = lambda *args: finetune_command.main([str(tmp_path / "start"), *map(str, args)])  # noqa: E731
    screen, told = look("--data", "digits", run=run, config=ROOT / "configs" / "finetune.yaml")
    assert "the head starts from prompts" in screen and "chance on digits:test acc@1 10 %" in screen and told == []


def test_a_dry_run_on_two_ranks_ends_well_and_writes_nothing(tiny, tmp_path, free_port):
    run = ("--config", tiny, "--run_folder", tmp_path / "run", "--dry-run")
    statuses, told = script_on_ranks(2, free_port, ROOT / "scripts" / "pretrain.py", *run, folder=tmp_path / "told")
    assert statuses == [0, 0] and told.count("a dry run") == 1, told
    assert told.count("the model reads") == 3 and "2 x cpu" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("['a dog', 'a cat']", "lists, dicts or JSON"),
        ('{"caption": "a dog"}', "lists, dicts or JSON"),
        ('[{"bbox": [1, 2, 3, 4], "label": "dog"}]', "lists, dicts or JSON"),
        ("[12.5, 30, 100, 7]", "numbers or boxes"),
        ("0 0.51 0.32 0.1 0.2", "numbers or boxes"),
        ("17", "numbers or boxes"),
        ("IMG_2041.JPG", "file names"),
        ("images/train/my dog.png", "file names"),
        ("https://example.com/a.jpg?x=1", "URLs"),
        ("b'a dog'", "Python's bytes"),
        ("<p>a dog</p>", "markup"),
        ("n/a", "missing values"),
        ("a dog\t1.jpg\na cat\t2", "rows of a table"),
        ("COCO_train2014_000000000009", "identifiers"),
        ("n01440764", "identifiers"),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "identifiers"),
    ],
)
def test_what_is_no_caption(look, tmp_path, text, kind):
    assert kind_of_text(text) == kind
    told = look(*pairs(tmp_path, [*CAPTIONS[:30], *(f"{text}{' ' * n}" for n in range(10))]))[1]
    assert len(told) == 1 and f"captions look like {kind}" in told[0] and "--data.caption_column" in told[0]


@pytest.mark.parametrize(
    "text",
    [
        "a dog", "dog", "A man (left) and a woman.", "2 dogs", "Two men , one in red .", "'A dog' by Warhol", "IMG",
        "the number 3", "Route 66 in 1955", "iPhone 12 Pro", "photo of b 'n b", "What is 2 + 2?", "3 x 4 tiles",
        "un chat noir", "一只狗",
        "none of them look up", "dog.", "x-ray", "a cat... on a mat", "Boeing 747-400", "love <3",
    ],
)  # fmt: skip
def test_what_may_be_a_caption(text):
    assert kind_of_text(text) is None


def test_captions_that_the_model_cannot_tell_apart(look, tmp_path):
    same_start = [f"this is a photograph that was taken of {caption}" for caption in CAPTIONS]
    told = look(*pairs(tmp_path, same_start))[1]
    assert len(told) == 1 and "are the same tokens" in told[0] and "--model.text.context_length" in told[0]


def test_captions_that_are_none_count_as_often_as_they_come(look, tmp_path):
    told = look(*pairs(tmp_path, [*CAPTIONS[:30], *["n/a"] * 10]), "--loss.duplicates", "ignore")[1]
    assert len(told) == 1 and "25% of the captions look like missing values, as 'n/a'" in told[0]
    assert look(*pairs(tmp_path, [*CAPTIONS[:60], "n/a"]))[1] == []  # one of 61 is no reason to doubt them all


def test_one_caption_for_all(look, tmp_path):
    told = look(*pairs(tmp_path, ["a photo"] * 20))[1]
    assert "all captions are 'a photo'" in told[0] and "meets 15 identical ones in a batch of 16" in told[1]


@pytest.mark.parametrize(("loss", "why"), [("softmax", "the loss is always 0"), ("sigmoid", "there are no negatives")])
def test_a_batch_of_one(look, tmp_path, loss, why):
    told = look(*pairs(tmp_path, CAPTIONS), "--loss", loss, "--train.global_batch_size", 1)[1]
    assert len(told) == 1 and why in told[0]


def test_odd_images(look, tmp_path):
    told = look(*pairs(tmp_path, CAPTIONS[:20], image=lambda n: np.zeros((12, 12, 3), np.uint8)))[1]
    assert len(told) == 1 and "20 of 20 images are of one colour" in told[0]
    same = np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)
    told = look(*pairs(tmp_path, CAPTIONS[:20], image=lambda n: same + np.uint8(n // 2)))[1]
    assert len(told) == 1 and "10 of 20 images are there before" in told[0]
    told = look(*pairs(tmp_path, CAPTIONS[:20], side=4))[1]
    assert len(told) == 1 and "4 pixels wide or high and are enlarged 4.0 times to 16" in told[0]


def test_unusable_samples(look, tmp_path):
    source = pairs(tmp_path, CAPTIONS[:20])
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"<html>")
    screen, told = look(*source)
    assert "unusable: unreadable_image 3:" in screen and "17 of them readable" in screen and told == []


def test_evaluation_on_the_training_data(look, tmp_path):
    source = pairs(tmp_path, CAPTIONS[:60])
    assert "is evaluated on and trained on" in look(*source, tmp_path / "pairs.jsonl")[1][0]
    assert "digits:train is evaluated on and trained on" in look("--data.eval", "digits:train")[1][0]
    (tmp_path / "again.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("road", "sea"))
    told = look(*source, tmp_path / "again.jsonl")[1]
    assert len(told) == 1 and "60 of 60 images of" in told[0]
    (tmp_path / "other").mkdir()
    noise = np.random.default_rng(5)
    pairs(tmp_path / "other", CAPTIONS[40:], image=lambda n: noise.integers(0, 256, (12, 12, 3), np.uint8))
    assert look(*source, tmp_path / "other" / "pairs.jsonl")[1] == []


def test_no_configuration_has_a_learning_rate_to_warn_of():
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        cls = {"cla": TrainClassifierConfig, "fin": FinetuneConfig}.get(file.name[:3], PretrainConfig)
        config = parse(cls, [], file, prog="", description="")
        width = config.model.image.width if hasattr(config, "model") else 768
        recipe = first_look.recipe_lr(config, width)
        assert config.optimizer.lr <= first_look.TOO_HIGH * recipe, file.name
    assert (
        first_look.recipe_lr(replace(PretrainConfig(), init="m"), 768)
        == first_look.recipe_lr(PretrainConfig(), 768) / 10
    )


def test_accelerate_launch_takes_it_and_its_process_all_cores(tiny, tmp_path):
    """accelerate 1.15 without --cpu sets OMP_NUM_THREADS=1 for its one process."""
    words = [sys.executable, *ACCELERATE, "--num_processes", "1", ROOT / "scripts" / "pretrain.py", "--dry_run"]
    words += ["--config", tiny]
    env = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    run = {"capture_output": True, "text": True, "env": env, "timeout": 120, "cwd": tmp_path}
    done = subprocess.run([*words, "--run_folder", "run"], **run)
    assert done.returncode == 0 and "a dry run" in done.stderr and "warning:" not in done.stderr, done.stderr
    assert f"1 x cpu, fp32, {len(os.sched_getaffinity(0))} threads each" in done.stderr
    assert list(tmp_path.iterdir()) == [tiny]
