"""The screen that a run begins with: what it will learn from, as the model gets it, and what makes one doubt it."""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from rich.table import Table
from rich.text import Text

from contrastive.data.doubts import doubts, short
from contrastive.data.inspection import (
    Measured,
    Seen,
    chosen_indices,
    facts,
    first_samples,
    image_hash,
    measure,
    summary,
)
from contrastive.data.order import SampleOrder
from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import BadSample, Source
from contrastive.distributed.runtime import Runtime
from contrastive.log import console, warn
from contrastive.train.contrastive_task import ContrastiveTask
from contrastive.train.task import TrainingTask

SHOWN = 3
MEASURED, DECODED, SECONDS = (64, 256), 64, 2.0  # at least and at most as many samples, while there is time
COMPARED = 64  # images of each held-out source
FACTS = ("inspected", "unusable", "cut captions", "duplicate captions", "duplicate images")
REPEATED = 0.1  # identical captions that a caption meets in its batch, from which the loss is another one
# A learning rate of published runs from scratch (CLIP, SigLIP, CC3M: ViT-B, AdamW), and where it holds.
LR, LR_BATCH, LR_WIDTH, MUON_LR = 1e-3, 1024, 768, 0.02
TOO_HIGH = 3  # times the recipe's
MEANING = {"negative": "which count as wrong", "ignore": "which are left out", "positive": "which count as right too"}


def first_look(task: TrainingTask, order: SampleOrder, runtime: Runtime, resumed_at: int) -> None:
    """Print what is about to be trained, where, on what; and a warning for each thing that looks wrong.

    A few samples at the start of the order are read, of remote data those of the first rank's first batch. No global
    random state is read or changed.

    Args:
        resumed_at: the step that a run goes on from, of which nothing but where it stands is said; 0: from the start.

    Raises:
        UserError: as from training, where no sample can be used.
    """
    config = task.config
    train, source = config.train, task.source
    rows = [("run", config.run_folder), *task.describe()]
    epochs = train.steps * train.global_batch_size / len(source)
    on_from = f", on from step {resumed_at:,}" if resumed_at else ""
    rows.append(
        ("training", f"{train.steps:,} steps of {train.global_batch_size:,} samples, {epochs:,.3g} epochs{on_from}")
    )
    threads = f", {torch.get_num_threads()} threads each" if runtime.device.type == "cpu" else ""
    rows.append(("on", f"{runtime.world_size} x {runtime.device.type}, {runtime.precision}{threads}"))
    said = []
    if not resumed_at:
        count = min(len(source), max(MEASURED[0], min(MEASURED[1], train.global_batch_size)))
        if source.remote:
            count = min(count, train.global_batch_size // runtime.world_size)
        samples = first_samples(task.dataset(order), min(SHOWN, count))
        indices = dict.fromkeys(order.index_of(place) for place in range(count))
        found = measure(source, _while_there_is_time(indices), task.tokenizer, DECODED)
        figures = facts(summary(source, found, task.tokenizer))
        rows += [row for sample in samples for row in _sample(sample, task)]
        rows += [*_classes(task), *(row for row in figures if row[0].partition(":")[0] in FACTS)]
        rows += [*_same_captions(task, found), *_chance(task)]
        said = [
            *doubts(source, found, task.tokenizer, task.model.config.image.image_size),
            *_doubts_of_run(task, found),
        ]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print(table)
    for line in said:
        warn(line)


def _while_there_is_time(indices: Iterable[int]) -> Iterator[int]:
    end = time.monotonic() + SECONDS
    for index in indices:
        yield index
        if time.monotonic() > end:
            return


def _sample(sample: Seen, task: TrainingTask) -> list[tuple[str, str]]:
    source = task.source
    if sample.tokens is None:
        names = source.class_names
        return [(f"sample {short(sample.key, 40)}", f"class {names[sample.label] if names else sample.label}")]
    others = len(sample.captions) - 1
    stored = _quoted(sample.captions[0]) + (f" and {others} more" if others else "")
    if source.prompted:
        stored = f"class {source.class_names[sample.label]}, {others + 1} prompts"
    read = _quoted(task.tokenizer.decode(sample.tokens))
    return [(f"sample {short(sample.key, 40)}", stored), ("  the model reads", read)]


def _quoted(text: str) -> str:
    return repr(short(text) if text.isprintable() else text[:100])


def _classes(task: TrainingTask) -> list[tuple[str, str]]:
    source, names = task.source, task.source.class_names
    if not names:
        return []
    rows = [("classes", f"{len(names):,}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")]
    if source.prompted and task.tokenizer:
        rows.append(("prompts", ", ".join(map(repr, fill(source.templates, names[0])[:3]))))
    return rows


def _same_captions(task: TrainingTask, found: Measured) -> list[tuple[str, str]]:
    if not isinstance(task, ContrastiveTask):
        return []
    batch, duplicates = task.config.train.global_batch_size, task.config.loss.duplicates
    others = found.matching * (batch - 1)
    return [("in a batch", f"a caption meets {others:.2g} identical ones, of {batch:,}, {MEANING[duplicates]}")]


def _chance(task: TrainingTask) -> list[tuple[str, str]]:
    """What a model that tells nothing apart has, on each of the data."""
    rows = [("chance", f"loss {task.chance_loss:.3f}")] if math.isfinite(task.chance_loss) else []
    for other in task.held_out:
        names = other.class_names
        if names is None:
            told = f"retrieval: R@1 {100 / len(other):.2g} %"
        elif isinstance(task, ContrastiveTask):
            told = f"'{short(fill(default_templates(other), names[0])[0])}', ...: acc1 {100 / len(names):.2g} %"
        else:
            told = f"acc1 {100 / len(names):.2g} %"
        rows.append((f"chance on {short(other.name, 40)}", told))
    return rows


def _doubts_of_run(task: TrainingTask, found: Measured) -> list[str]:
    """What is odd about the options for these data."""
    config, said = task.config, []
    batch, limit = config.train.global_batch_size, config.data.max_bad_share
    bad = found.inspected - found.readable
    if bad > max(1, limit * found.inspected):
        said.append(
            f"{bad} of {found.inspected} samples cannot be used; the run stops where more than {limit:.1%} of "
            f"{config.data.bad_window:,} are so (--data.max_bad_share)"
        )
    said += [line for other in task.held_out if (line := _leak(task.source, found, other))]
    for name, recipe in (("lr", _recipe_lr(task)), ("muon_lr", MUON_LR)):
        if (rate := getattr(config.optimizer, name, 0)) > TOO_HIGH * recipe:
            said.append(
                f"optimizer.{name} {rate:g} is {rate / recipe:.0f} times what published recipes come to for batch "
                f"{batch:,} and width {task.model.config.image.width}: try --optimizer.{name} {recipe:.1g}"
            )
    return said + _doubts_of_pairs(task, found) if isinstance(task, ContrastiveTask) else said


def _doubts_of_pairs(task: ContrastiveTask, found: Measured) -> list[str]:
    config, tokenizer, said = task.config, task.tokenizer, []
    batch, text = config.train.global_batch_size, config.model.text
    if batch == 1:
        why = "the loss is always 0" if config.loss_name == "softmax" else "there are no negatives"
        said.append(f"train.global_batch_size is 1: with no other pair to tell apart from, {why}; raise it")
    others = found.matching * (batch - 1)
    if config.loss.duplicates == "negative" and others > REPEATED:
        said.append(
            f"a caption meets {others:.2g} identical ones in a batch of {batch:,}, which the loss takes for wrong: "
            "use --loss.duplicates positive, or ignore"
        )
    rows = tokenizer(list(found.caption_keys)[: MEASURED[1]])
    ended = (rows == tokenizer.eos_id).sum(dim=1)
    odd = int((ended != 1).sum()) if tokenizer.pad_id != tokenizer.eos_id else int((ended == 0).sum())
    if text.pool == "eos" and odd:
        said.append(
            f"{odd} of {len(rows)} captions have no end-of-text token, or one in their midst, and the text tower reads "
            "there (model.text.pool eos): use another --data.tokenizer, or --model.text.pool last"
        )
    if text.pool == "last" and tokenizer.context_length < text.context_length:
        said.append(
            f"texts are {tokenizer.context_length} tokens long and the text tower, which reads the last of "
            f"{text.context_length}, never sees its last positions: make model.text.context_length the tokenizer's"
        )
    return said


def _recipe_lr(task: TrainingTask) -> float:
    """The learning rate of published runs, for the batch and the width: by its root below theirs, and one over it.

    A tower that has learned is tuned at a tenth, but where its lower layers learn more slowly.
    """
    config = task.config
    decays = getattr(config.optimizer, "layer_decay", 1) < 1
    tuned = getattr(config, "init", None) and getattr(config, "tune", "all") == "all" and not decays
    scaled = LR * min(1, math.sqrt(config.train.global_batch_size / LR_BATCH))
    return scaled * max(1, LR_WIDTH / task.model.config.image.width) * (0.1 if tuned else 1)


def _leak(source: Source, found: Measured, other: Source) -> str:
    """Say so where held-out data holds what is trained on."""
    mend = "its figures say nothing of new images; name held-out data with --data.eval"
    ours = {part.fingerprint for part in source.parts}
    if ours & {part.fingerprint for part in other.parts}:
        return f"{other.name} is evaluated on and trained on: {mend}"
    if other.remote or source.remote:
        return ""
    shared, compared = 0, 0
    for index in _while_there_is_time(chosen_indices(other, COMPARED, 0)):
        try:
            shared += image_hash(other[int(index)].image) in found.image_keys
            compared += 1
        except BadSample:
            continue
    # As many as are expected where all of it is trained on, for few of the training data were read.
    expected = compared * found.readable / len(source)
    if shared < max(2, REPEATED * expected):
        return ""
    return f"{shared} of {compared} images of {other.name} are among {found.readable} that are trained on: {mend}"
