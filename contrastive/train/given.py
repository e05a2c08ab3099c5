"""What was asked for, against what comes of it: beside --init, on --resume. Read by a run, not by importing one."""

import functools
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from contrastive.config import flatten, to_dict
from contrastive.errors import UserError
from contrastive.log import say
from contrastive.train.options import LENGTHS, RunConfig
from contrastive.train.task import TrainingTask

# What may differ when a run is resumed: nothing that decides which samples come, in what form, for what loss. The data
# may have moved: they are compared by their fingerprint, and so is their order, by `check_cursor`.
MAY_CHANGE = re.compile(
    r"trackers|init_key|(schedule|evaluation|checkpoint|wise_ft)\..*|"
    r"optimizer\.(lr|muon_lr|weight_decay|logit_lr_factor|layer_decay|beta2|eps)|"
    r"train\.(steps|accumulate|precision|max_grad_norm|log_every|max_skipped)|"
    r"data\.(train|eval|num_workers|timeout|max_bad_share|bad_window)|"
    r"train\.(seed|global_batch_size)|data\.(window|lanes|replacement)|model\.(image|text)\.gradient_checkpointing"
)


def given_options(config: RunConfig) -> dict[str, bool]:
    """The config's `given`; of one that was made in Python, all that is not as it is by default."""
    if config.given is not None:
        return config.given
    usual = type(config)()
    for part in fields(config):  # of a chosen loss or optimizer, its own defaults
        value = getattr(config, part.name)
        if is_dataclass(value) and type(value) is not type(getattr(usual, part.name)):
            usual = replace(usual, **{part.name: type(value)()})
    before = flatten(to_dict(usual))
    return {name: True for name, value in flatten(to_dict(config)).items() if value != before.get(name)}


def counts(config: RunConfig, name: str, cause: str) -> bool:
    """Whether option `name` was given and has to take effect though option `cause` keeps it from that.

    A flag has to. A file serves several choices: what it gives has to where the file itself gives the cause.
    """
    given = given_options(config)
    return given.get(name, False) or (name in given and given.get(cause) is False)


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
    kept = [name for name in said if not MAY_CHANGE.fullmatch(name)]
    if kept:
        raise UserError(
            f"a resumed run keeps its {kept[0]} (asked for: {'; '.join(said[name] for name in kept)}): leave it as it "
            "was, or start another run with a --run_folder of its own; pretraining starts from these weights with "
            f"--init {config.run_folder}"
        )
    schedule = "; from here on the learning rate is that of a run of this length" if "train.steps" in said else ""
    return f"resuming with {'; '.join(said.values())}{schedule}" if said else ""


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


def check_effect(task: TrainingTask) -> None:
    """Raise UserError for a given option that the chosen data, tower or other options leave without effect.

    A configuration that was made in Python is not asked: what it holds that is no default may have been filled in.
    """
    config = task.config
    if config.given is None:
        return
    parts = [part for source in (task.source, *task.held_out) for part in source.parts]
    read = {name for part in parts for name in part.columns_read}
    lacking = {"image_column": "columns", "caption_column": "texts to choose from"}
    for name in sorted(lacking.keys() - read):
        if counts(config, f"data.{name}", "data.train"):
            raise UserError(f"data.{name} has no effect: {task.source.name} has no {lacking[name]}; leave it out")
    for prefix, section in _sections("", config):
        for cls in type(section).__mro__:
            for name, (cause, switched_off) in vars(cls).get("UNUSED", {}).items():
                cause = cause and prefix + cause
                if counts(config, prefix + name, cause) and switched_off(section):
                    value = functools.reduce(getattr, cause.split("."), config) if cause else "in this kind of run"
                    why = f"without {cause}" if value in (None, ()) else f"with {cause} {value}" if cause else value
                    raise UserError(f"{prefix}{name} has no effect {why}; leave it out")


def _sections(prefix: str, options: Any) -> Iterator[tuple[str, Any]]:
    yield prefix, options
    for part in fields(options):
        value = getattr(options, part.name)
        if is_dataclass(value):
            yield from _sections(f"{prefix}{part.name}.", value)
