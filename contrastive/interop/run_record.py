"""What a run folder tells of the model in it: options, data, recipe, results. Nothing of the machine it ran on."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from contrastive.errors import UserError
from contrastive.files import read_json, read_yaml
from contrastive.interop.bundle import checkpoints_in, is_native
from contrastive.log import read_metrics
from contrastive.results import (
    EVALUATION_FILE,
    ZERO_SHOT_FILE,
    RecordedFigure,
    figures_of_evaluation,
    figures_of_row,
    figures_of_zero_shot,
)

# Results written so many seconds before the final weights are of an earlier checkpoint. Copying a run gives all its
# files about the same time, and then nothing is held to be stale.
STALE_SECONDS = 60


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells of it."""

    folder: Path
    config: dict
    step: int | None
    """Of the weights; None for a final model whose options do not name the last step."""
    num_samples: int | None
    averaged: bool
    """Whether the weights are the moving average."""
    results: tuple[RecordedFigure, ...]

    @classmethod
    def of(cls, model_folder: Path) -> "RunRecord | None":
        """Read the run that a native model folder lies in; None for another folder, and where it lies in none.

        Raises:
            UserError: its files hold something else than a run writes.
        """
        try:
            run = cls._of(model_folder)
            if run is not None:  # all of it in words, as a card does
                run.public_options(), *run.data(), *run.recipe(), *(result.written for result in run.results)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{model_folder.parent} is not as a run leaves it ({error}); copy the run again") from None
        return run

    @classmethod
    def _of(cls, model_folder: Path) -> "RunRecord | None":
        if not is_native(model_folder):
            return None
        model_folder = model_folder.resolve()  # 'final' and '.' lie somewhere too
        is_checkpoint = model_folder.parent.name == "checkpoints"
        folder = model_folder.parent.parent if is_checkpoint else model_folder.parent
        try:
            config = read_yaml(folder / "config.yaml", "the options of the run")
        except UserError:
            return None
        # encoder/ and other folders of a run are not what its options and figures are about.
        if not isinstance(config, dict) or not (is_checkpoint or model_folder.name == "final"):
            return None
        # A final model has no state of its own; how many samples there were, any checkpoint of the run knows.
        checkpoints = [model_folder] if is_checkpoint else checkpoints_in(folder / "checkpoints")[::-1]
        state = next(filter(None, (_content(checkpoint / "state.json") for checkpoint in checkpoints)), {})
        train = config["train"] if isinstance(config.get("train"), dict) else {}
        step = state.get("step") if is_checkpoint else train.get("steps")
        results = _logged(folder, step) if is_checkpoint else [*_logged(folder, step), *_evaluated(folder)]
        found = {(result.task, result.data, result.name): result for result in results}  # the last of each counts
        averaged = train.get("ema_decay") is not None
        return cls(folder, config, step, state.get("num_samples"), averaged, tuple(found.values()))

    def option(self, name: str):
        """An option by its dotted name; None where the run has no such option."""
        value = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def data(self) -> Iterator[tuple[str, str]]:
        """What it was trained on, and how in words."""
        option = self.option
        if option("data.train"):
            yield (
                "trained on",
                public_name(option("data.train")) + (f", {self.num_samples:,} samples" if self.num_samples else ""),
            )
        told = {"data.templates": "prompts of classes", "data.prompts": "prompts of classes"}  # as older runs have it
        for name, what in (told | {"data.caption_templates": "captions in"}).items():
            value = option(name)
            if value and value != ["{}"]:
                yield what, ", ".join(value) if isinstance(value, list) else public_name(str(value))
        if (option("data.share") or 1) != 1:
            yield "share of the labels", str(option("data.share"))
        yield "augmentation", _augmentation(option("data.augment") or {})

    def recipe(self) -> Iterator[tuple[str, str]]:
        """Loss, optimizer, lengths and the like, and how in words."""
        option = self.option
        for what in ("loss", "optimizer", "schedule"):
            if option(what):
                yield what, _said(option(what))
        for what in ("mixup", "cutmix", "label_smoothing"):
            if option(what):
                yield what.replace("_", " "), str(option(what))
        batch, steps = option("train.global_batch_size"), self.step
        if batch:
            yield "batch", f"{batch:,}"
        if steps:
            seen = f", {steps * batch:,} samples seen" if batch else ""
            epochs = f" ({steps * batch / self.num_samples:.2g} epochs)" if batch and self.num_samples else ""
            yield "length", f"{steps:,} steps{seen}{epochs}"
        kept = {name: option(f"train.{name}") for name in ("precision", "max_grad_norm", "seed", "ema_decay")}
        if any(value is not None for value in kept.values()):
            yield "other", _said(kept)

    def public_options(self) -> dict:
        """All options that are not of the machine, paths by their `public_name`."""
        left_out = ("run_folder", "resume", "trackers")
        return _without_places({name: value for name, value in self.config.items() if name not in left_out})


def public_name(spec: str) -> str:
    """A data spec, a file or a folder without where it lies: '/data/me/mnist:test' is 'mnist:test'.

    A pattern of shards keeps the folder it is in, which is the name of the data. URLs lose host and keys alike.
    """
    if " → " in str(spec):  # what was fitted on, and what was scored
        return " → ".join(map(public_name, spec.split(" → ")))
    parts = []
    for part in re.split(r",(?![^{]*})", str(spec)):
        if re.match(r"(hf|hf-hub):[^/.~]", part):
            parts.append(part)
            continue
        names = [name for name in part.partition("?")[0].rstrip("/").split("/") if name not in ("", ".", "..", "~")]
        is_pattern = bool(names) and re.search(r"[{*]", names[-1]) is not None and len(names) > 1
        parts.append("/".join(names[-2:] if is_pattern and not names[-2].endswith(":") else names[-1:]))
    return ",".join(parts)


def _without_places(value):
    """The same nested options, each text that could be a path as `public_name` gives it."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return public_name(value) if isinstance(value, str) and "/" in value else value


def _said(options: dict | str) -> str:
    """'muon: lr 0.002, weight decay 0.1'."""
    if not isinstance(options, dict):
        return str(options)
    told = {name.replace("_", " "): value for name, value in options.items() if value is not None and name != "name"}
    said = [f"{name} {value}" for name, value in told.items()]
    return f"{options['name']}: {', '.join(said)}" if "name" in options else ", ".join(said)


def _augmentation(options: dict) -> str:
    """Those that do something."""
    said = []
    if list(options.get("crop_scale", (1, 1))) != [1, 1]:
        said.append("random crops of {} to {} of the area".format(*options["crop_scale"]))
    if options.get("flip"):
        said.append("mirrored")
    if options.get("rand_augment_ops"):
        said.append(f"RandAugment ({options['rand_augment_ops']}, {options.get('rand_augment_magnitude')})")
    if any(options.get("color_jitter", ())):
        said.append(f"colour jitter {options['color_jitter']} of {options.get('color_jitter_prob')}")
    if options.get("gray_prob"):
        said.append(f"grey {options['gray_prob']}")
    return ", ".join(said) or "none"


def _content(file: Path) -> dict:
    """What a JSON file holds; nothing where it cannot be read."""
    try:
        return read_json(file)
    except UserError:
        return {}


def _logged(folder: Path, step: int | None) -> list[RecordedFigure]:
    """The last evaluation that the run itself made of these weights."""
    if not (folder / "metrics.jsonl").is_file():
        return []
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get("kind") == "eval"]
    rows = [row for row in rows if step is None or row.get("step") == step]
    return [_public(figure) for row in rows[-1:] for figure in figures_of_row(row)]


def _evaluated(folder: Path) -> Iterator[RecordedFigure]:
    """What evaluations of the final weights found."""
    for found in _results_of_final(folder, f"zero_shot/*/{ZERO_SHOT_FILE}"):
        yield from map(_public, figures_of_zero_shot(found))
    for found in _results_of_final(folder, f"evaluation/*/{EVALUATION_FILE}"):
        of = f" ({found['limit']:,} samples)" if found.get("limit") else ""
        yield from (_public(figure, of) for figure in figures_of_evaluation(found))


def _public(figure: RecordedFigure, of: str = "") -> RecordedFigure:
    """The figure, its data named without a place and with what part of them it is of."""
    return replace(figure, data=public_name(figure.data) + of)


def _results_of_final(folder: Path, pattern: str) -> Iterator[dict]:
    """The JSON files of evaluations that are not older than the final weights."""
    weights = max((file.stat().st_mtime for file in (folder / "final").glob("*.safetensors")), default=0.0)
    for file in sorted(folder.glob(pattern)):
        found = _content(file)
        if found and file.stat().st_mtime >= weights - STALE_SECONDS:
            yield found
