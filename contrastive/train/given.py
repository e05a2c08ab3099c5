"""What was asked for, against what comes of it: on --resume, beside other options, from the model that --init names.

Read by a run, not by importing one.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from contrastive.config import flatten, to_dict, written_options
from contrastive.data.preprocess import Preprocess
from contrastive.data.sources.columns import check_columns
from contrastive.distributed.launching import has_gpu, launched
from contrastive.errors import UserError
from contrastive.interop.bundle import Bundle
from contrastive.interop.loading import load
from contrastive.log import say
from contrastive.models import DualEncoder
from contrastive.objectives.learner import PREFIX
from contrastive.optim import COOLED_DOWN, ScheduleConfig
from contrastive.option_types import as_option
from contrastive.train.contrastive_task import PretrainConfig
from contrastive.train.options import LENGTHS, RunConfig, Stage, counts, given_options, native_options, num_workers
from contrastive.train.task import Curriculum, TrainingTask

# What may differ when a run is resumed: nothing that decides which samples come, in what form, for what loss. The data
# may have moved: they are compared by their fingerprint, and so is their order, by `check_cursor`.
MAY_CHANGE = re.compile(
    r"trackers|init_key|max_restarts|curriculum|objectives\.\w+\.teacher|(schedule|evaluation|checkpoint|health|wise_ft)\..*|"
    r"optimizer\.(lr|muon_lr|weight_decay|logit_lr_factor|layer_decay|beta2|eps)|"
    r"train\.(steps|seed|global_batch_size|accumulate|micro_batch_tokens|precision|compile|gradient_checkpointing|max_grad_norm|log_every|max_skipped)|"
    r"data\.(train|eval|window|lanes|replacement|num_workers|timeout|max_bad_share|bad_window)"
)
ONLY_IN_TRAINING = ("dropout", "patch_dropout")  # of a tower, and no part of its architecture
# What a file says of its own data alone: what they are scored on and prompted with, how small images are cut up.
OF_DATA = ("data.eval", "data.templates", "patch_size")
# Options that another one leaves without any effect: which, the other one, and its value then.
NO_EFFECT = (
    ("evaluation.every evaluation.batch_size evaluation.limit", "data.eval", []),
    ("data.bad_window", "data.max_bad_share", 1),
    ("data.augment.crop_ratio", "data.augment.crop_scale", [1, 1]),
    ("data.augment.rand_augment_magnitude", "data.augment.rand_augment_ops", 0),
    ("data.augment.color_jitter", "data.augment.color_jitter_prob", 0),
    ("data.augment.color_jitter_prob", "data.augment.color_jitter", [0, 0, 0, 0]),
    ("schedule.final_fraction", "schedule.decay", "constant"),
    *(("schedule.cooldown_steps", "schedule.decay", decay) for decay in ("cosine", "linear", "constant")),
    (" ".join(f"model.image.{name}" for name in ONLY_IN_TRAINING), "lock", "image"),
    ("dropout optimizer.layer_decay optimizer.muon_lr", "tune", "head"),
    ("templates wise_ft.alphas", "head", "zeros"),
    (
        "model.init_logit_scale model.init_logit_bias model.text.causal model.text.pool model.text.attend_padding "
        "model.text.projection model.text.projection_bias optimizer.logit_lr_factor data.token_dropout",
        "loss.name",
        "none",
    ),
    ("health.spike_window health.spike_threshold health.spike_steps", "health.on_spike", "none"),
)


def for_other_data(config: RunConfig, file: Path) -> RunConfig:
    """Return the options without what `file`, which nobody named, has for its own data: see OF_DATA."""
    usual, its = type(config)(), written_options(type(config), file)
    other = its.get("data.train") not in (None, config.data.train)
    own = [name for name in OF_DATA if other and name in its.keys() - config.given.keys()]
    if own:
        say(f"{' and '.join(own)} of {file.name} left aside: --data.train names other data")
    for section, _, option in (name.rpartition(".") for name in own):
        if section:
            data = replace(config.data, **{option: getattr(usual.data, option)})
            config = replace(config, data=data)
        else:
            config = replace(config, **{option: getattr(usual, option)})
    return config


def check_preset(asked: RunConfig, config: RunConfig) -> None:
    """Raise UserError where `model NAME` was given to a resumed run, whose model is another one.

    Args:
        asked: with the preset's own options, config: with those that the run was started with.
    """
    given = given_options(config)
    if "model" not in given:
        return
    now = flatten(to_dict(config)["model"])
    for name, value in flatten(to_dict(asked)["model"]).items():
        # What is left open follows from the data, and so does the size of a classifier's images.
        open_ = value is None or (hasattr(config, "patch_size") and name in ("image.image_size", "image.patch_size"))
        if not open_ and value != now[name] and name.rpartition(".")[2] not in ONLY_IN_TRAINING:
            by = "--model" if given["model"] else "--config"
            raise UserError(f"a resumed run keeps its model: model.{name} is {now[name]}, not {value}; leave {by} out")


def changes_on_resume(config: RunConfig, before: dict[str, Any]) -> str:
    """Return which options a resumed run goes on with that are not those it had, in a line; '' where there are none.

    Args:
        config: resolved. before: what config.yaml says, by dotted names.

    Raises:
        UserError: an option that a run keeps from its start to its end.
    """
    now, given = flatten(to_dict(config)), given_options(config)
    asked = {name for name in now if name in given or (name.endswith(".name") and name[:-5] in given)}
    asked |= {"train.steps"} if any(f"train.{name}" in given for name in LENGTHS) else set()
    asked -= {"run_folder", "resume", "dry_run"}
    changed = [name for name in before if name in asked and before[name] != now[name]]
    said = {name: f"{name} {before[name]} → {now[name]}" for name in changed}
    had, has = (sorted({n.split(".")[1] for n in each if n.startswith("objectives.")}) for each in (before, now))
    if had != has and "objectives" in given:
        said["objectives"] = f"objectives {' '.join(had) or 'none'} → {' '.join(has) or 'none'}"
    kept = [name for name in said if not MAY_CHANGE.fullmatch(name)]
    if kept:
        raise UserError(
            f"a resumed run keeps its {kept[0]} (asked for: {'; '.join(said[name] for name in kept)}): leave it as it "
            "was, or start another run with a --out of its own; pretraining starts from these weights with "
            f"--init {config.run_folder}"
        )
    schedule = "; from here on the learning rate is that of a run of this length" if "train.steps" in said else ""
    return f"resuming with {'; '.join(said.values())}{schedule}" if said else ""


def check_steps_done(task: TrainingTask, before: dict[str, Any], done: int) -> None:
    """Raise UserError where the `done` steps of a resumed run, whose options were `before`, would now be others."""
    length, steps, schedule = before["train.steps"], task.config.train.steps, task.config.schedule
    stages = as_option("curriculum", tuple[Stage, ...], before.get("curriculum", []))
    mend = "until counts in shares of train.steps: give such as leave the steps done as they were"
    then, now = Curriculum(stages, length, task.model.image_tower).at, task.curriculum.at
    compared = []
    if (stages, length) != (task.config.curriculum, steps):
        compared.append(("curriculum", "image size and patch dropout", then, now, mend))
    old = ScheduleConfig(**{name: before.get(f"schedule.{name}") for name in vars(schedule)})
    # With the other decays a run of another length is another one from its start.
    if schedule.decay in COOLED_DOWN and (old, length) != (schedule, steps):
        then, now = partial(old.factor, total_steps=length), partial(schedule.factor, total_steps=steps)
        mend = f"keep the warm-up, and begin the cooldown at step {done} or later: train.steps, schedule.cooldown_steps"
        compared.append(("schedule", "a share of the learning rate of", then, now, mend))
    for option, what, then, now, mend in compared:
        for step in range(done):
            if then(step) != now(step):
                asked = f"was done with {what} {then(step)}, and would now have been with {now(step)}"
                raise UserError(f"{option}: step {step} {asked}; {mend}")


def check_effect(task: TrainingTask) -> None:
    """Raise UserError for a given option that the chosen data, tower or other options leave without effect.

    A configuration that was made in Python is not asked: what it holds that is no default may have been filled in.
    """
    config = task.config
    if config.given is None:
        return
    values, data = flatten(to_dict(config)), config.data
    rows = [*NO_EFFECT]
    views = {name.removesuffix(".crop_scale") for name in values if name.endswith(".augment.crop_scale")}
    for section in views - {"data.augment"}:
        of_views = (row for row in NO_EFFECT if "data.augment" in row[0])
        rows += [(*(text.replace("data.augment", section) for text in row[:2]), row[2]) for row in of_views]
    if data.preprocess.short_side is None:
        rows.append(("data.preprocess.cut", "data.preprocess.resize", "squash"))
    if not (launched() or num_workers(data, has_gpu())):
        rows.append(("data.timeout", "data.num_workers", data.num_workers))
    if not config.health.rolls_back:
        rows.append(("health.max_roll_backs", "health.on_spike", config.health.on_spike))
    if values.get("data.tokenizer") not in ("bpe", "auto"):
        rows.append(("data.vocab_size", "data.tokenizer", values.get("data.tokenizer")))
    found = []
    for names, cause, off in rows:
        if values.get(cause, ...) == off:
            why = f" without {cause}" if off in (None, []) else f" with {cause} {values[cause]}"
            found += [(name, cause, why) for name in names.split()]
    if not config.automatic:
        found.append(("max_restarts", "resume", " without --resume auto"))
    if "loss.name" not in values:
        found.append(("optimizer.logit_lr_factor", "", " in this kind of run"))  # there is no logit_scale
    for name, cause, why in found:
        if counts(config, name, cause):
            raise UserError(f"{name} has no effect{why}; leave it out")
    columns = [name for name in ("data.image_column", "data.caption_column") if counts(config, name, "data.train")]
    check_columns([task.source, *task.held_out], {name: values[name] for name in columns})


def starting_model(config: PretrainConfig, checkpoint: Path | None) -> tuple[Bundle, PretrainConfig]:
    """Return the model that training starts from, and the options with its architecture and preprocessing.

    Args:
        checkpoint: of a resumed run, which has these parts itself.

    Raises:
        UserError: no model there, or one without the parts that are asked of it; an option that was given is another
            one in the model.
    """
    # The flags of the first command of a resumed run do not change its parts when they are given again.
    start = load(checkpoint or config.init or config.init_image)
    start.check_image_tower("a run starts from an image tower, or from both")
    flag = "init" if config.init else "init_image"
    image, length = config.model.image, config.model.text.context_length
    size, patch = (
        getattr(image, name) if counts(config, f"model.image.{name}", flag) else None
        for name in ("image_size", "patch_size")
    )
    start = at_size(start, size, patch)
    asked = config.init and start.tokenizer is not None and counts(config, "model.text.context_length", flag)
    if asked and length != start.config.text.context_length:
        tokenizer, tower = start.tokenizer.with_length(length), start.model.text_tower
        say(f"text positions of {start.path}: {tower.set_context_length(length)}")
        start = replace(start, tokenizer=tokenizer, config=replace(start.config, text=tower.config))
    whole = _with_parts_of(start, config)
    check_brought(config, whole, flag)
    return start, whole


def at_size(bundle: Bundle, size: int | None, patch: int | None = None) -> Bundle:
    """Return the bundle for images, and patches, of so many pixels, resampled; itself for None and its own sizes.

    Native images have as many patches at most as such a square then.
    """
    own = bundle.config.image
    size, patch = size or own.image_size, patch or own.patch_size
    if (size, patch) == (own.image_size, own.patch_size):
        return bundle
    options = replace(bundle.preprocess.config.options, patches=None)
    model, preprocess = bundle.model, Preprocess(options.at(size, patch))
    if patch == own.patch_size:
        model.image_tower.set_input_size(size)
    else:
        model.image_tower.set_patch_size(patch, size)
        say(f"the patch embedding of {bundle.path} is resampled for patches of {patch} pixels")
    model.config = replace(model.config, image=model.image_tower.config)
    say(f"the positions of {bundle.path} are resampled for images of {size} pixels")
    return replace(bundle, preprocess=preprocess, config=replace(bundle.config, image=model.config.image))


def copy_weights(start: Bundle, model: DualEncoder, config: PretrainConfig) -> None:
    """Copy the weights of the towers that `config` starts from, and say so."""
    if config.init:
        weights = start.model.state_dict()
        if model.logit_bias is None:  # which may be absent from either
            weights.pop("logit_bias", None)
        else:
            weights.setdefault("logit_bias", model.logit_bias.detach())
        beside = {name: value for name, value in model.state_dict().items() if name.startswith(PREFIX)}
        model.load_state_dict(weights | beside)  # objectives start afresh
    else:
        model.image_tower.load_state_dict(start.model.image_tower.state_dict())
    say(f"starting from {start.path}: its {'towers' if config.init else 'image tower'} and preprocessing")


def _with_parts_of(start: Bundle, config: PretrainConfig) -> PretrainConfig:
    """Return the options with the architecture and preprocessing of the model that training starts from.

    What only training knows, dropout say, and whether the logits have a bias are the run's own.

    Raises:
        UserError: --init of a model without a text tower.
    """
    image, preprocess = _trained_as(config.model.image, start.config.image), start.preprocess.config.options
    if config.model.image.native and not image.native:  # SigLIP 2's second stage: the same weights, images as they are
        image, preprocess = replace(image, native=True), native_options(preprocess)
    data = replace(config.data, preprocess=preprocess)
    if config.init is None:
        model = replace(config.model, image=image, embed_dim=start.model.config.embed_dim)
    else:
        start.check_text_tower("--init starts both towers; use --init_image")
        ours = start.tokenizer
        kind = "clip" if ours.kind == "clip" else "auto"
        data = replace(data, tokenizer=kind, vocab_size=ours.vocab_size, clean=ours.clean)
        has_bias = config.loss.initial_logits(2)[1] is not None
        model = replace(
            start.config,
            image=image,
            text=_trained_as(config.model.text, start.config.text),
            init_logit_bias=start.config.init_logit_bias if has_bias else None,
        )
    return replace(config, model=model, data=data)


def _trained_as(asked: Any, tower: Any) -> Any:
    """Return a tower's options with those of `asked` that matter in training alone."""
    return replace(tower, **{name: getattr(asked, name) for name in ONLY_IN_TRAINING if hasattr(asked, name)})


def check_brought(asked: RunConfig, config: RunConfig, flag: str) -> None:
    """Raise UserError for a given option that is another one in the model which `--flag` names; see `counts`.

    Args:
        asked: before, config: after the options were replaced by the model's.
    """
    before, now = flatten(to_dict(asked)), flatten(to_dict(config))
    other = [name for name in now if name in before and before[name] not in (None, now[name])]
    other = [name for name in other if name.startswith(("model.", "data."))]
    preset = counts(asked, "model", flag)
    refused = [name for name in other if counts(asked, name, flag) or (preset and name.startswith("model."))]
    if refused:
        said = "; ".join(f"{name} {before[name]} (the model's: {now[name]})" for name in refused)
        raise UserError(
            f"--{flag} {getattr(asked, flag)} brings its own {refused[0]}: {said}. Leave it out, or leave out --{flag}"
        )
    left = [name for name in other if name in given_options(asked)]
    if left:
        say(f"--{flag} brings its own; the configuration file's are left aside: {', '.join(left)}")
