"""Every option of every kind of run, set to another value: config.yaml changes and the run does too, or it is an error.

The options are read from the dataclasses: a new one is walked over by itself. Where a value of its type will not do, or
where it only matters beside others, VALUES and BESIDE say so.
"""

import dataclasses
import functools
import hashlib
import typing

import pytest
import yaml
from accelerate.state import AcceleratorState
from evaluate.small_model import save_small_model
from torch.utils.checkpoint import checkpoint

from contrastive.config import _flat_types, flatten, parse, to_dict
from contrastive.data.loader import train_loader
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.evaluate import report
from contrastive.log import read_metrics
from contrastive.models import transformer
from contrastive.named_sections import chosen
from contrastive.objectives import OBJECTIVES
from contrastive.optim import MuonConfig
from contrastive.train import first_look, loop, run
from contrastive.train.bad_samples import BadSamples
from contrastive.train.classify import TrainClassifierConfig, train_classifier
from contrastive.train.finetune import FinetuneConfig, finetune
from contrastive.train.pretrain import PretrainConfig, pretrain
from contrastive.train.saver import CheckpointSaver
from contrastive.train.task import TrainingTask

how_to_evaluate = TrainingTask.how_to_evaluate
KINDS = {
    "pretrain": (PretrainConfig, pretrain),
    "finetune": (FinetuneConfig, finetune),
    "classifier": (TrainClassifierConfig, train_classifier),
    "objectives": (PretrainConfig, pretrain),  # apart, or the run of every other option would wait for them
}
COMMON = """
train: {steps: 2, global_batch_size: 8, ema_decay: 0.5}
optimizer: {name: muon}
schedule: {warmup_steps: 0, final_fraction: 0.1}
evaluation: {every: 2, limit: 8, batch_size: 4}
"""
AUGMENT = "{crop_scale: [0.3, 1.0], rand_augment_ops: 1, color_jitter: [0.4, 0.4, 0.4, 0.1], gray_prob: 0.2}"
IMAGE = "image_size: 8, patch_size: 4, width: 16, depth: 1, num_heads: 2, mlp_dim: 16"
PRETRAIN = f"""{COMMON}
model:
  embed_dim: 16
  image: {{{IMAGE}, projection: true}}
  text: {{context_length: 8, width: 16, depth: 1, num_heads: 2, mlp_dim: 16}}
data: {{train: "digits:train", eval: ["digits:test"], vocab_size: 300, augment: {AUGMENT}}}
"""
FILES = {
    "pretrain": PRETRAIN,
    "objectives": f"""{PRETRAIN}
objectives:
  caption: {{width: 16, depth: 1, num_heads: 2, mlp_dim: 16}}
  self_distill: {{crops: 1, crop_size: 4, prototypes: 8, hidden: 8, bottleneck: 8, augment: {AUGMENT}}}
  masked: {{prototypes: 8, hidden: 8, bottleneck: 8}}
  patch_distill: {{prototypes: 8, hidden: 8, bottleneck: 8}}
  patch_mean: {{}}
  slip: {{hidden: 8, out: 8, augment: {AUGMENT}}}
  distill: {{teacher: [TEACHER], feature_weight: 0.5, project: true}}
""",
    "classifier": f"""{COMMON}
model: {{image: {{{IMAGE}, pool: average, projection: true}}, embed_dim: 16}}
data: {{train: digits, augment: {AUGMENT}}}
""",
    "finetune": f"{COMMON}\ndata: {{train: digits, augment: {AUGMENT}}}\nwise_ft: {{alphas: [0.0, 0.5]}}",
}
WALKED = ("caption", "self_distill", "masked", "patch_distill", "patch_mean", "slip", "distill")  # objectives
VALUES = {  # where another value of the type would be wrong, as the words after the flag
    "schedule.decay": "constant",
    "schedule.cooldown_steps": "2",
    "train.steps": "3",
    "curriculum": "until=0.5,image_size=4,patch_dropout=0.5",
    "train.epochs": "0.02",
    "train.samples": "24",
    "train.global_batch_size": "4",
    "train.accumulate": "2",
    "train.micro_batch_tokens": "64",
    "data.native.patches": "2 4",
    "data.preprocess.patches": "3",
    "train.precision": "bf16",
    "train.compile": "off",
    "train.ema_decay": "0.05",
    "train.max_grad_norm": "0.01",
    "evaluation.every": "1",
    "checkpoint.every": "2",
    "trackers": "tensorboard",
    "optimizer.layer_decay": "0.5",
    "optimizer.eps": "0.1",
    "data.window": "100",
    "data.lanes": "2",
    "data.share": "0.5",
    "data.max_bad_share": "0.5",
    "data.preprocess.short_side": "12",
    "data.preprocess.mean": "0.1 0.2 0.3",
    "data.preprocess.std": "0.1 0.2 0.3",
    "data.augment.crop_scale": "0.1 0.2",
    "data.augment.crop_ratio": "0.3 0.4",
    "data.augment.color_jitter": "0 0 0.9 0.5",
    "data.augment.color_jitter_prob": "0.1",
    "data.augment.rand_augment_magnitude": "29",
    "data.augment.gray_prob": "0.9",
    "data.caption_templates": "x{}x",
    "data.clean": "canonicalize",
    "data.vocab_size": "270",
    "model.embed_dim": "24",
    "model.image.num_heads": "4",
    "model.text.num_heads": "4",
    "model.image.width": "32",
    "model.text.width": "32",
    "model.image.image_size": "16",
    "model.image.patch_size": "2",
    "model.image.norm_eps": "0.1",
    "model.text.norm_eps": "0.1",
    "model.image.patch_dropout": "0.5",
    "model.num_classes": "7",
    "model.text.vocab_size": "400",
    "model.text.eos_id": "7",
    "image_size": "16",
    "patch_size": "2",
    "head": "zeros",
    "templates": "plain",
    "wise_ft.eval": "digits:test",
    "wise_ft.alphas": "0.3",
    "wise_ft.save": "0.5",
    "mixup": "0.4",
    "cutmix": "1",
    "lock": "image",
    "loss.max_logit_scale": "5",
    "objectives.caption.start": "0.5",
    "objectives.caption.width": "32",
    "objectives.caption.num_heads": "4",
    "objectives.caption.norm_eps": "0.1",
    "objectives.self_distill.start": "0.5",
    "objectives.masked.start": "0.5",
    "objectives.patch_distill.start": "0.5",
    "objectives.patch_mean.start": "0.5",
    "objectives.patch_distill.share": "0.9",
    "objectives.patch_distill.window": "1",
    "objectives.slip.start": "0.5",
    "objectives.distill.start": "0.5",
    "objectives.distill.scale": "3",
    "objectives.self_distill.momentum": "0.1",
    "objectives.masked.momentum": "0.1",
    "objectives.patch_distill.momentum": "0.1",
    "objectives.patch_mean.momentum": "0.1",
    **{
        name.replace("data", f"objectives.{objective}"): value
        for objective in ("self_distill", "slip")
        for name, value in (
            ("data.augment.crop_scale", "0.1 0.2"),
            ("data.augment.crop_ratio", "0.3 0.4"),
            ("data.augment.color_jitter", "0 0 0.9 0.5"),
            ("data.augment.color_jitter_prob", "0.1"),
            ("data.augment.rand_augment_magnitude", "29"),
            ("data.augment.gray_prob", "0.9"),
        )
    },
}
BESIDE = {  # what else it takes for it to matter
    "all_captions": "--data.captions_per_image 2 --loss softmax --loss.duplicates negative",
    "data.spread_captions": "--data.captions_per_image 2 --data.templates photo",
    "schedule.cooldown_steps": "--schedule.decay wsd",
    "data.lanes": "--data.window 100",
    "data.preprocess.cut": "--data.preprocess.resize crop --data.preprocess.short_side 11",
    "model.image.pool": "--model.image.class_token",
    "model.text.attend_padding": "--model.text.pool average",
}
SAID = {"train.epochs": "train.steps", "train.samples": "train.steps"}  # as what an option stands in config.yaml
FILLED_IN = {"init_key", "resume", "dry_run", "run_folder"}  # which need no value of their own, or have tests of theirs
NOT_SEEN = {
    "train.max_skipped": "tests/train/test_loop.py",
    "train.compile": "tests/train/test_compile.py",
    **dict.fromkeys(
        ["health.on_non_finite", "health.on_spike", "health.spike_window", "health.spike_threshold"]
        + ["health.spike_steps", "health.max_roll_backs"],
        "tests/faults/test_roll_back.py",
    ),
    "health.hang_after": "tests/train/test_hang_watch.py",
    "health.patience": "tests/faults/test_frozen_ranks.py",
}  # and where it shows


def another(name: str, annotation, value) -> list[str]:
    """The words of a flag that sets an option to another value than it has."""
    flag = f"--{name}"
    if name in VALUES:
        return [flag, *VALUES[name].split()]
    if isinstance(value, bool):
        section, dot, option = name.rpartition(".")
        return [f"--{section}{dot}no_{option}" if value else flag]
    kinds = [annotation, *typing.get_args(annotation)]
    literal = next((k for k in kinds if typing.get_origin(k) is typing.Literal), None)
    if literal:
        return [flag, str(next(choice for choice in typing.get_args(literal) if choice not in (value, "auto")))]
    if int in kinds:
        return [flag, str((value or 0) + 1)]
    if float in kinds:
        return [flag, str((value or 0.25) / 2)]
    return [flag, "other"]


def start(kind, folder, words, init):
    """Do a run; return its config.yaml by dotted names, and all else that can be seen of it."""
    cls, train = KINDS[kind]
    seen = {}

    class Saver(CheckpointSaver):
        def save(self, cursor, in_background):
            config = self._config
            options = config.keep, config.keep_every, config.background
            seen.setdefault("checkpoints", []).append((cursor, in_background, *options))

    def bad_samples(*args):
        seen["bad_samples"] = args
        return BadSamples(*args)

    def runtime(*args):
        seen["runtime"] = args[:2]
        return Runtime(*args)

    def loader(dataset, **how):
        seen["loader"] = how
        return train_loader(dataset, **{**how, "num_workers": 0})

    def evaluated(task, runtime):
        how = how_to_evaluate(task, runtime)
        seen["evaluation"] = {**how, "device": None}
        return how

    def checkpointed(*args, **how):
        seen["recomputed"] = True
        return checkpoint(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        for place, name, instead in (
            (loop, "CheckpointSaver", Saver),
            (loop, "BadSamples", bad_samples),
            (loop, "train_loader", loader),
            (run, "Runtime", runtime),
            (transformer, "checkpoint", checkpointed),
            (TrainingTask, "how_to_evaluate", evaluated),
            (first_look, "first_look", lambda *args, **how: None),
            (report, "write_report", lambda *args, **how: None),
        ):
            patch.setattr(place, name, instead)
        AcceleratorState._reset_state(reset_partial_state=True)  # else the first precision is that of all
        words = [*words, "--run_folder", str(folder), *(["--init", str(init)] if kind == "finetune" else [])]
        file = init.parent / f"{kind}.yaml"
        run.command(cls, train, ["--config", str(file), *words], name="t", doc="", default_recipe=str(file), shown="")
    rows = read_metrics(folder / "metrics.jsonl")
    timed = ("samples_per_second", "data_wait")
    seen["metrics"] = [{name: str(value) for name, value in row.items() if name not in timed} for row in rows]
    seen["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name)
    of_their_own = ("config.yaml", "metrics.jsonl", ".lock", "starts.json", "manifest.json")
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in of_their_own:
            seen[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return flatten(yaml.safe_load((folder / "config.yaml").read_text())), seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The plain run of each kind, done when asked for; the model that fine-tuning starts from; the options of each."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = save_small_model(folder / "teacher")
    for kind, text in FILES.items():
        (folder / f"{kind}.yaml").write_text(text.replace("TEACHER", str(teacher)))

    @functools.cache
    def of(kind):
        return start(kind, folder / kind, [], folder / "pretrain")

    @functools.cache
    def configured(kind):
        return parse(KINDS[kind][0], [], folder / f"{kind}.yaml", prog="t", description="")

    of("pretrain")
    return of, folder / "pretrain", configured


def options():
    """(kind, name) of each option; one that all kinds share is tried in one of them, in turn."""
    names = {}
    for kind, (cls, _) in KINDS.items():
        config = dataclasses.replace(cls(), optimizer=MuonConfig())
        if kind == "objectives":
            config = dataclasses.replace(config, objectives=chosen(OBJECTIVES, WALKED))
        for name in flatten(to_dict(config)):
            if (name.split(".")[0] == "objectives") != (kind == "objectives"):
                continue
            if name not in FILLED_IN and not name.endswith(".name") and (kind, name) != ("finetune", "init"):
                names.setdefault(name, []).append(kind)
    for number, (name, kinds) in enumerate(names.items()):
        shared = len(kinds) == len(KINDS) - 1
        yield from ((kind, name) for kind in ([kinds[number % len(kinds)]] if shared else kinds))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_again_looks_the_same(kind, runs, tmp_path):
    of, init, _ = runs
    assert start(kind, tmp_path / "run", [], init)[1] == of(kind)[1]


@pytest.mark.parametrize(("kind", "name"), list(options()))
def test_it_shows(kind, name, runs, tmp_path):
    of, init, configured = runs
    config = configured(kind)
    types = _flat_types(type(config))
    words = another(name, types[name], flatten(to_dict(config)).get(name))
    before, plain = of(kind)
    beside = [] if kind == "finetune" else BESIDE.get(name, "").split()
    if beside:
        before, plain = start(kind, tmp_path / "beside", beside, init)
    try:
        after, seen = start(kind, tmp_path / "run", [*words, *beside], init)
    except UserError as error:
        told = (name.rpartition(".")[2], words[-1])  # of which option it is, or which value
        assert any(one in str(error) for one in told) and "\n" not in str(error)
        return
    own = SAID.get(name, name)
    assert after[own] != before[own], f"{' '.join(words)} is not in config.yaml"
    assert seen != plain or name in NOT_SEEN, f"{' '.join(words)} changes nothing"
