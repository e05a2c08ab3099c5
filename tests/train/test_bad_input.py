"""What a user gets wrong stops the run at the start, with one line, and nothing is written or overwritten."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
from launching import command, environment, pretrain_here, rows
from PIL import Image

from contrastive.commands.pretrain_command import main
from contrastive.errors import UserError


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trian.steps", "3"], "unknown flag --trian.steps. Did you mean 'train.steps'"),
        (["--confg", "x.yaml"], "unknown flag --confg. Did you mean 'config'"),
        (["--train.steps", "many"], "--train.steps.*'many'"),
        (["--train.steps", "0"], "train.steps is 0; it must be above 0"),
        (["--train.samples", "0"], "train.samples is 0; it must be above 0"),
        (["--train.samples", "9", "--train.epochs", "1"], "give --train.epochs or --train.samples, not both"),
        (["--data.lanes", "5"], "data.lanes 5 does not divide the batch of 16; use a divisor of it, such as 16"),
        (["--data.window", "0"], "data.window is 0; it must be above 0"),
        (["--between_captions", "0.5"], "between_captions needs several captions .* give --data.captions_per_image"),
        (
            ["--between_captions", "0.5", "--data.captions_per_image", "2", "--loss.duplicates", "ignore"],
            "between_captions with loss.duplicates ignore: .* use --loss.duplicates negative",
        ),
        (["--data.spread_captions"], "data.spread_captions needs several captions .* --data.captions_per_image"),
        (["--all_captions", "--loss", "softmax"], "all_captions needs several captions .* --data.captions_per_image"),
        (["--all_captions", "--data.captions_per_image", "2"], "is for --loss softmax: sigmoid's sums over all pairs"),
        (
            ["--all_captions", "--data.captions_per_image", "2", "--loss", "softmax", "--loss.duplicates", "positive"],
            "all_captions with loss.duplicates positive: .* use --loss.duplicates negative",
        ),
        (["--data.token_dropout", "1"], "data.token_dropout is 1.0; it must be at least 0 and below 1"),
        (["--report_to", "none"], "tracker none is unknown or not installed.*, or leave --trackers out"),
        (["--data.replacement", "--data.window", "9"], "data.window and data.lanes mean nothing with data.replacement"),
        (["--data.train", "digits=0,scenes=1"], "weight '0' is not a number above 0"),
        (["--loss", "sigmod"], "unknown loss 'sigmod'. Did you mean 'sigmoid'"),
        (["--loss", "softmax", "--loss.init_bias", "1"], "--loss.init_bias is --model.init_logit_bias now"),
        (["--loss", "softmax", "--model.init_logit_bias", "1"], "model.init_logit_bias is for losses with a bias"),
        (["--model", "clip_vit_b_61"], "unknown model 'clip_vit_b_61'. Did you mean 'clip_vit_b_16'"),
        (["--optimizer", "adam"], "unknown optimizer 'adam'. Did you mean 'adamw'"),
        (["--model.image.image_size", "20"], "20 is not a multiple of model.image.patch_size 8; use 16 or 24"),
        (["--data.train", "scnes"], "scnes.*scenes"),
        (["--data.train", "nowhere/train-*.tar"], "nowhere/train"),
        (["--data.train", "missing.csv"], "missing.csv"),
        (["--data.eval", "digits:tset"], "tset"),
        (["--train.global_batch_size", "5000"], "5000 is larger than 'digits:train' with its [0-9]+ samples"),
        (["--train.global_batch_size", "10", "--train.accumulate", "4"], "10 does not divide into 1 ranks with 4"),
        (["--data.tokenizer", "clip"], "model.text.vocab_size 300 is smaller than the tokenizer's 49408"),
        (["--model.text.eos_id", "7"], "model.text.eos_id is 7, but the tokenizer's is 1; set --model.text.eos_id 1"),
        (["--data.tokenizer", "no/such/folder"], "no/such/folder"),
        (["--resume"], "nothing to resume in .*run: it has no config.yaml"),
    ],
)
def test_stops_with_one_line(args, message, tiny, tmp_path):
    run = tmp_path / "run"
    vocabulary = ["--model.text.vocab_size", "300"] if "clip" in args else []
    with pytest.raises(UserError, match=message) as error:
        main(["--config", str(tiny), "--run_folder", str(run), *vocabulary, *args])
    assert "\n" not in str(error.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stpes: 3}", "unknown key 'train.stpes'. Did you mean 'train.steps'"),
        ("train: {steps: many}", "train.steps is 'many', expected int"),
        ("train: [", "not valid YAML"),
    ],
)
def test_bad_configuration_file(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        main(["--config", str(path), "--run_folder", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_empty_data(tiny, tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    (tmp_path / "folder").mkdir()
    for spec in ("pairs.csv", "folder"):
        with pytest.raises(UserError, match=spec):
            main(["--config", str(tiny), "--run_folder", str(tmp_path / "run"), "--data.train", str(tmp_path / spec)])


def test_existing_run_folder_is_left_alone(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("precious")
    done = subprocess.run(
        command("--config", tiny, "--run_folder", run), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"pretrain.py: error: {run} exists; continue it with --resume, or name another folder with --out"
    ]
    assert [path.name for path in run.iterdir()] == ["mine.txt"] and (run / "mine.txt").read_text() == "precious"


def test_unreadable_images_and_empty_captions_are_counted(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "data.tar", "w") as shard:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))

        for index in range(40):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(picture, "JPEG")
            add(f"{index:03d}.jpg", b"not an image" if index == 3 else picture.getvalue())
            add(f"{index:03d}.txt", b"  " if index == 5 else f"picture number {index}".encode())
    run = tmp_path / "run"
    args = ("--data.train", tmp_path / "data.tar", "--data.eval", tmp_path / "data.tar", "--train.steps", "5")
    pretrain_here("--config", tiny, "--run_folder", run, *args)  # 5 steps of 16 visit all 40 twice
    assert "passed over in the data: " in capsys.readouterr().err
    for reason in ("unreadable_image", "empty_caption"):
        assert sum(row["counts"].get(reason, 0) for row in rows(run, "bad_samples")) >= 2
    assert len(rows(run)) == 5
    report = (run / "report.html").read_text()
    assert "unreadable_image" in report or "unreadable image" in report
    assert json.loads((run / "final" / "config.json").read_text())["format"] == "contrastive-1"
