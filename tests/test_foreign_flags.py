"""Flags of open_clip, transformers, timm and clip_benchmark: short for ours, or one line with our name and value."""

import re

import pytest

from contrastive.commands import embed_command as embed
from contrastive.commands import evaluate_command as evaluate
from contrastive.commands import export_command as export
from contrastive.commands import zero_shot_command as zero_shot
from contrastive.config import flatten, parse, to_dict
from contrastive.errors import UserError
from contrastive.train.classify import TrainClassifierConfig
from contrastive.train.finetune import FinetuneConfig
from contrastive.train.pretrain import PretrainConfig
from contrastive.train.run import command
from contrastive.words import table

KINDS = (PretrainConfig, FinetuneConfig, TrainClassifierConfig)


def parsed(cls, *args):
    return parse(cls, list(args), prog="t", description="", also={"config": ("NAME", "")})


@pytest.mark.parametrize("cls", KINDS)
def test_the_common_ones_are_short(cls):
    for dash in ("-", "_"):
        words = "--epochs 3 --batch_size 64 --lr 1e-4 --wd 0.3 --seed 5 --workers 2"
        flags = f"{words} --train_data digits --val_data digits:test --output_dir runs/x".replace("_", dash).split()
        config = parsed(cls, *flags)
        assert (config.train.epochs, config.train.global_batch_size, config.train.seed) == (3, 64, 5)
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.num_workers) == (1e-4, 0.3, 2)
        assert (config.data.train, config.data.eval, config.run_folder) == ("digits", ("digits:test",), "runs/x")
        config = parsed(cls, *"--warmup 10 --accum_freq=2 --report_to wandb tensorboard".replace("_", dash).split())
        assert (config.schedule.warmup_steps, config.train.accumulate) == (10, 2)
        assert config.trackers == ("wandb", "tensorboard")
    assert parsed(cls, "--data=digits").data.train == "digits"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--gradient-accumulation-steps 4", "--gradient-accumulation-steps 4 is --train.accumulate 4 here."),
        ("--gradient_accumulation_steps=4", "--gradient_accumulation_steps 4 is --train.accumulate 4 here."),
        ("--warmup_steps 2000", "--warmup_steps 2000 is --schedule.warmup_steps 2000 here."),
        ("--precision amp_bf16", "--precision amp_bf16 is --train.precision bf16 here."),
        ("--precision amp", "is --train.precision bf16 here."),
        ("--precision fp32", "is --train.precision fp32 here."),
        ("--fp16", "--fp16 is --train.precision bf16 (float16 is not offered) here."),
        ("--bf16 --do_train", "--bf16 is --train.precision bf16 here."),
        ("--num_train_epochs 3", "is --train.epochs 3 here."),
        ("--max_steps 30", "is --train.steps 30 here."),
        ("--learning_rate 5e-5", "is --optimizer.lr 5e-5 here."),
        ("--weight_decay 0.1", "is --optimizer.weight_decay 0.1 here."),
        ("--per_device_train_batch_size 32", "--train.global_batch_size, of all ranks together: 32 times their number"),
        ("--report-to wandb --seed 3 --precision amp_bf16", "--precision amp_bf16 is --train.precision bf16 here."),
        ("--siglip", "--siglip is --loss sigmoid here."),
        ("--use-naflex", "--use-naflex is --model.image.native here."),
        ("--local-loss", "--local-loss: not needed, the loss is always shared out"),
        ("--gather-with-grad", "not needed"),
        ("--lock-image", "--lock-image is --lock image"),
        ("--freeze_vision_model", "is --lock image"),
        ("--lock-text", "not offered"),
        ("--pretrained laion2b", "is --init laion2b, where that is a folder or hf-hub:ORG/NAME, here."),
        ("--device cuda", "--device: a flag of accelerate launch: --cpu; a GPU is used where there is one."),
        ("--cpu", "a flag of accelerate launch: --cpu"),
        ("--use-bn-sync", "not needed"),
        ("--distill-model ViT-L-14 --debug", "--distill-model: not offered: leave it out. --debug: not offered"),
        ("--val-num-samples 5000", "not needed"),
        ("--cache-dir /c", "HF_HOME=/c"),
        ("--model_name_or_path m", "is --init m here."),
        ("--grad-checkpointing", "is --train.gradient_checkpointing 1 here."),
        ("--dataset-type webdataset", "not needed"),
        ("--csv-img-key path", "is --data.image_column path here."),
        ("--csv-caption-key title", "is --data.caption_column title here."),
        ("--imagenet-val /data", "is --data.eval /data here."),
        ("--zeroshot-frequency 2", "--evaluation.every N, in steps"),
        ("--save-frequency 1", "--checkpoint.every N, in steps"),
        ("--save_steps 500", "is --checkpoint.every 500 here."),
        ("--logging_steps 10", "is --train.log_every 10 here."),
        ("--force-patch-dropout 0.5", "is --model.image.patch_dropout 0.5 here."),
        ("--torchcompile", "--train.compile on"),
        (
            "--name exp1 --logs l",
            "--name exp1 is --out exp1 here. --logs l is --out l/NAME",
        ),
        ("--image-mean 0 0 0", "--data.preprocess.mean, with the same three numbers, here"),
        ("-b 8 -train-data d", "-b: flags have two dashes here. -train-data: flags have two dashes here. See --help"),
        ("--dataset_name nlphuji/flickr30k", "is --data.train hf:nlphuji/flickr30k here."),
        ("--push_to_hub", "contrastive export"),
        ("--overwrite_output_dir", "not offered"),
    ],
)
def test_the_rest_is_told_with_our_name_and_value(flags, line):
    with pytest.raises(UserError) as error:
        parsed(PretrainConfig, *flags.split())
    assert line in str(error.value) and "\n" not in str(error.value) and "Did you mean" not in str(error.value)


def test_all_that_is_to_mend_is_told_at_once():
    flags = "--precision amp_bf16 --siglip --warmup 10 --local-loss --lrr 3 --save-frequency 1"
    told = (
        "--precision amp_bf16 is --train.precision bf16 here. --siglip is --loss sigmoid here. --local-loss: not "
        "needed, the loss is always shared out over the ranks, with all gradients. unknown flag --lrr. Did you mean "
        "'lr'? --save-frequency 1 is --checkpoint.every N, in steps, here. See --help"
    )
    with pytest.raises(UserError) as error:
        parsed(PretrainConfig, *flags.split())
    assert str(error.value) == told
    told = "--dataset cifar10 is --data cifar10 here. --pretrained: the model is the first word, a folder or hf-hub:O"
    with pytest.raises(UserError, match=told):
        zero_shot.main(["RUN", "--dataset", "cifar10", "--pretrained", "openai"])
    told = "--candidate_labels cat,dog is --classes FILE, of a name a line, here. unknown flag --bach-size. Did you"
    with pytest.raises(UserError, match=told):
        zero_shot.main(["RUN", "--candidate_labels", "cat,dog", "--bach-size", "4"])


def test_a_hint_names_only_flags_that_there_are():
    with pytest.raises(UserError, match="--lock-image is --tune head here"):
        parsed(FinetuneConfig, "--lock-image")
    with pytest.raises(UserError, match="unknown flag --siglip"):
        parsed(TrainClassifierConfig, "--siglip")
    with pytest.raises(UserError, match="--pretrained is --model NAME, from scratch; contrastive finetune MODEL"):
        parsed(TrainClassifierConfig, "--pretrained")
    with pytest.raises(UserError, match="'photos' belongs to no flag; data to train on are named by --data.train"):
        parsed(TrainClassifierConfig, "photos", "--epochs", "3")


def test_a_list_given_again_goes_on_and_the_last_of_single_values_counts():
    words = ["--val-data", "digits:test", "--batch-size", "8", "--batch-size", "16"]
    config = parsed(PretrainConfig, *words, "--data.eval=scenes:test", "--seed", "3", "--data.eval", "a", "b")
    assert (config.train.global_batch_size, config.train.seed) == (16, 3)
    assert config.data.eval == ("digits:test", "scenes:test", "a", "b")


@pytest.mark.parametrize("flags", ["--loss sigmoid scenes:val", "--model ViT-B-32 scenes:val --seed 3"])
def test_a_word_after_a_name_goes_to_no_other_flag(flags):
    with pytest.raises(UserError, match="takes one value, .*, not also 'scenes:val'"):
        parsed(PretrainConfig, "--val-data", "digits:test", *flags.split())


def test_resume_takes_no_value_but_latest_and_auto(tiny_file, tmp_path):
    words = {"name": "t", "doc": "", "default_recipe": str(tiny_file), "shown": ""}
    with pytest.raises(UserError, match="--resume goes on from the newest .*; leave out 'a/1.pt'"):
        command(PretrainConfig, lambda config: True, ["--resume", "a/1.pt"], **words)
    with pytest.raises(UserError, match=f"newest .*; add --out before '{tmp_path}'$"):
        command(PretrainConfig, lambda config: True, ["--resume", str(tmp_path)], **words)
    resumes = []
    for args in (
        ["--resume", "latest"],
        ["--resume=latest", "--lr", "1"],
        ["--run_folder", "latest"],
        ["--resume", "auto", "--run_folder", str(tmp_path / "new")],
    ):
        command(PretrainConfig, lambda config: resumes.append(config.resume) or True, args, **words)
    assert resumes == [True, True, False, False]


def test_the_recipe_that_nobody_named_scores_and_prompts_its_own_data_only(tmp_path, capsys):
    recipe, seen = tmp_path / "a.yaml", []
    recipe.write_text("data: {train: scenes, eval: ['scenes:test'], templates: scenes}\ntrain: {steps: 3}")

    def data_of(*args):
        run = lambda config: not seen.append(config.data)  # noqa: E731
        command(PretrainConfig, run, list(args), name="t", doc="", default_recipe=str(recipe), shown="")
        return seen[-1].train, seen[-1].eval, seen[-1].templates

    assert data_of("--data.train", "p.csv") == ("p.csv", (), "auto")
    said = "data.eval and data.templates of a.yaml left aside: --data.train names other data"
    assert said in capsys.readouterr().err
    assert data_of("--train-data", "p.csv", "--data.eval", "q.csv") == ("p.csv", ("q.csv",), "auto")
    assert "data.templates of a.yaml left aside" in capsys.readouterr().err
    its_own = ("scenes", ("scenes:test",), "scenes")
    assert data_of() == data_of("--data.train", "scenes") == data_of("--seed", "3") == its_own
    assert data_of("--config", str(recipe), "--data.train", "p.csv") == ("p.csv", *its_own[1:])
    assert "left aside" not in capsys.readouterr().err


def test_the_global_batch_is_said_where_there_are_ranks(tiny_file, monkeypatch, capsys):
    words = {"name": "t", "doc": "", "default_recipe": str(tiny_file), "shown": ""}
    monkeypatch.setenv("WORLD_SIZE", "8")
    command(PretrainConfig, lambda config: True, ["--batch-size", "256"], **words)
    assert "--batch_size is the global batch here: 256 over 8 ranks, 32 each" in capsys.readouterr().err


@pytest.fixture
def tiny_file(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: 3}")
    return tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        (zero_shot, "RUN --dataset cifar10", "--dataset cifar10 is --data cifar10 here."),
        (zero_shot, "RUN --data d --pretrained openai", "--pretrained: the model is the first word"),
        (zero_shot, "RUN --imagenet-val d", "--imagenet-val d is --data d here."),
        (zero_shot, "RUN --data d --cpu", "--cpu is --device cpu here."),
        (
            zero_shot,
            "--model M --dataset a --xyz 3",
            "NAME. --dataset a is --data a here. unknown flag --xyz. See",
        ),
        (zero_shot, "RUN --data a.tar b.tar", "--data takes one value, not also 'b.tar'; quote a pattern"),
        (evaluate, "RUN --task zero_shot --data d --classes imagenet", "is --option classes=imagenet here."),
        (evaluate, "RUN --custom-template-file t.txt", "is --option templates=t.txt here."),
        (evaluate, "--models RUN", "the model is the first word"),
        (zero_shot, "RUN --data d --model ViT-B-32", "--model: the model is the first word"),
        (zero_shot, "RUN --data d --split test", "--split: part of the data's name, as cifar10:test"),
        (evaluate, "RUN --dataset_root /data", "--dataset_root /data is --data PATH here."),
        (evaluate, "RUN --output out.json", "--output out.json is --out DIR here."),
        (evaluate, "RUN --model_type open_clip", "the model is the first word"),
        (embed, "RUN d OUT --dataset cifar10", "--dataset: the data are the second word"),
        (embed, "RUN d OUT --amp", "--amp is --precision bf16 here."),
        (embed, "RUN d OUT --num_workers 3", "--num_workers 3 is --workers 3 here."),
        (embed, "RUN d OUT --normalize", "unknown flag --normalize. See --help"),
        (export, "RUN --format onnx OUT", "--format onnx is --to onnx here."),
        (embed, "RUN d OUT --csv-caption-key title", "--csv-caption-key title is --caption_column title here."),
        (export, "RUN --to onnx OUT --output x", "--output: the last word, OUT"),
    ],
)
def test_flags_of_the_other_scripts(script, flags, line):
    with pytest.raises(UserError) as error:
        script.main(flags.split())
    assert line in str(error.value)


def test_underscores_are_dashes_in_the_other_scripts_too():
    words = ["RUN", "d", "OUT", "--batch_size", "3", "--samples-per-shard=7", "--image-column", "a_b"]
    options = parse(embed.EmbedOptions, words, prog="embed", description="")
    assert (options.batch_size, options.samples_per_shard, options.image_column) == (3, 7, "a_b")


@pytest.mark.parametrize("row", [row for row in table() if row[0] == "flag"], ids=lambda row: row[1][0])
def test_each_row_names_a_flag_that_there_is(row):
    ours = re.match(r"--([\w.-]+)", row[2])
    options = {name for cls in KINDS for name in flatten(to_dict(cls()))} | {"loss", "optimizer"}
    others = ["workers", "data", "limit", "out", "precision", "templates", "classes"]
    others += ["device", "option", "model", "to", "batch_size", "image_column", "caption_column"]
    assert ours is None or ours[1] in options or ours[1] in others
