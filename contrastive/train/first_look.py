"""The screen that a run begins with: what it will learn from, as the model gets it, and what makes one doubt it."""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from rich.table import Table
from rich.text import Text

from contrastive.data.inspection import (
    Measured,
    Seen,
    chosen_indices,
    doubts,
    facts,
    first_samples,
    image_hash,
    measure,
    short,
    summary,
)
from contrastive.data.order import SampleOrder
from contrastive.data.prompts import default_templates, fill
from contrastive.data.record import BadSample, Source
from contrastive.distributed.runtime import Runtime
from contrastive.log import console, warn
from contrastive.train.contrastive_task import ContrastiveTask
from contrastive.train.options import RunConfig, most_patches
from contrastive.train.task import TrainingTask

Rows = list[tuple[str, str]]
SHOWN = 3
MEASURED, DECODED, SECONDS = (64, 256), 64, 2.0  # at least and at most as many samples, while there is time
COMPARED = 64  # images of each held-out source
FACTS = ("inspected", "unusable", "cut captions", "duplicate captions", "duplicate images")
REPEATED = 0.1  # identical captions that a caption meets in its batch, from which the loss is another one
# The learning rate of published runs from scratch (CLIP, SigLIP, CC3M: ViT-B, AdamW), and where it holds.
LR, LR_BATCH, LR_WIDTH, MUON_LR = 1e-3, 1024, 768, 0.02
TOO_HIGH = 3  # times theirs
MEANING = {"negative": "which count as wrong", "ignore": "which are left out", "positive": "which count as right too"}


def first_look(task: TrainingTask, order: SampleOrder, runtime: Runtime, resumed_at: int) -> None:
    """Print what is about to be trained, where, on what; and a warning for each thing that looks wrong.

    A few samples at the start of the order are read, of remote data those of this rank's first batch. No global
    random state is read or changed.

    Args:
        resumed_at: the step that a run goes on from, of which is told where it stands; 0: from the start.

    Raises:
        UserError: as from training, where no sample can be used.
    """
    train, source, said = task.config.train, task.source, []
    samples = f"{train.steps:,} steps of {train.global_batch_size:,} samples"
    epochs = f"{train.steps * train.global_batch_size / len(source):,.3g} epochs"
    from_step = f", on from step {resumed_at:,}" if resumed_at else ""
    threads = f", {torch.get_num_threads()} threads each" if runtime.device.type == "cpu" else ""
    rows = [("run", task.config.run_folder), *task.describe(), ("training", f"{samples}, {epochs}{from_step}")]
    rows += [("curriculum", str(task.curriculum))] if task.config.curriculum else []
    dataset, image = task.dataset(order), task.model.config.image
    rows += [("images", str(dataset.image_size))] if image.native else []
    rows += [("on", f"{runtime.world_size} x {runtime.device.type}, {runtime.precision}{threads}")]
    if not resumed_at:
        count = min(len(source), max(MEASURED[0], min(MEASURED[1], train.global_batch_size)))
        if source.remote:
            count = min(count, train.global_batch_size // runtime.world_size)
        for sample in first_samples(dataset, min(SHOWN, count)):
            rows += _sample(sample, task)
        indices = dict.fromkeys(map(order.index_of, range(count)))
        found = measure(source, _while_there_is_time(indices), task.tokenizer, DECODED)
        rows += _figures(task, found)
        side = math.isqrt(most_patches(task.config, image)) * image.patch_size if image.native else image.image_size
        said = doubts(source, found, task.tokenizer, side) + _doubts_of_run(task, found)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for line in said:
        warn(line)


def _while_there_is_time(indices: Iterable[int]) -> Iterator[int]:
    end = time.monotonic() + SECONDS
    for index in indices:
        yield index
        if time.monotonic() > end:
            return


def _sample(sample: Seen, task: TrainingTask) -> Rows:
    names, captions, key = task.source.class_names, sample.captions, f"sample {short(sample.key, 40)}"
    if task.tokenizer is None:
        return [(key, f"class {names[sample.label] if names else sample.label}")]
    read = sample.tokens if sample.tokens.ndim == 1 else sample.tokens[0]
    stored = repr(captions[0][:100]) + (f" and {len(captions) - 1} more" if len(captions) > 1 else "")
    if task.source.prompted:
        stored = f"class {names[sample.label]}, {len(captions)} prompts"
    return [(key, stored), ("  the model reads", repr(short(task.tokenizer.decode(read))))]


def _figures(task: TrainingTask, found: Measured) -> Rows:
    """What was measured, what it does to the loss, and what a model that tells nothing apart has."""
    source, names, batch, rows = task.source, task.source.class_names, task.config.train.global_batch_size, []
    if names:
        rows.append(("classes", f"{len(names):,}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"))
        if source.prompted and task.tokenizer:
            rows.append(("prompts", ", ".join(map(repr, fill(source.templates, names[0])[:3]))))
    rows += [row for row in facts(summary(source, found, task.tokenizer)) if row[0].partition(":")[0] in FACTS]
    if isinstance(task, ContrastiveTask) and task.loss is not None:
        met = f"a caption meets {found.matching * (batch - 1):.2g} identical ones"
        rows.append((f"in a batch of {batch:,}", f"{met}, {MEANING[task.config.loss.duplicates]}"))
    if math.isfinite(task.chance_loss):
        rows.append(("chance", f"loss {task.chance_loss:.3f}"))
    for other in task.held_out if task.chooses else ():
        told = f"retrieval: R@1 {100 / len(other):.2g} %"
        if names := other.class_names:
            told = f"acc@1 {100 / len(names):.2g} %"
            if task.tokenizer:
                told += f", as '{short(fill(default_templates(other), names[0])[0])}'"
        rows.append((f"chance on {short(other.name, 40)}", told))
    return rows


def _doubts_of_run(task: TrainingTask, found: Measured) -> list[str]:
    """What is odd about the options for these data."""
    config, batch, width = task.config, task.config.train.global_batch_size, task.model.config.image.width
    said = [line for other in task.held_out if (line := _leak(task.source, found, other))]
    for name, recipe in (("lr", recipe_lr(config, width)), ("muon_lr", MUON_LR)):
        if (rate := getattr(config.optimizer, name, 0)) > TOO_HIGH * recipe:
            said.append(
                f"optimizer.{name} {rate:g} is {rate / recipe:.0f} times what published recipes come to for batch "
                f"{batch:,} and width {width}: try --optimizer.{name} {recipe:.1g}"
            )
    if not isinstance(task, ContrastiveTask) or task.loss is None:
        return said
    if batch == 1:
        why = "the loss is always 0" if config.loss_name == "softmax" else "there are no negatives"
        said.append(f"train.global_batch_size is 1: with no other pair to tell apart from, {why}; raise it")
    identical = found.matching * (batch - 1)  # expected in a sample's batch
    if config.loss.duplicates == "negative" and identical > REPEATED:
        said.append(
            f"a caption meets {identical:.2g} identical ones in a batch of {batch:,}, and the loss takes "
            "them for wrong: use --loss.duplicates positive, or ignore"
        )
    tokens = task.tokenizer(list(found.caption_keys)[: MEASURED[1]])
    ends = (tokens == task.tokenizer.eos_id).sum(dim=1)
    odd = int((ends == 0).sum()) if task.tokenizer.pad_id == task.tokenizer.eos_id else int((ends != 1).sum())
    if odd and config.model.text.pool == "eos":
        said.append(
            f"{odd} of {len(tokens)} captions have no end-of-text token, or one in their midst, where the text tower "
            "reads (model.text.pool eos): use another --data.tokenizer, or --model.text.pool last"
        )
    return said


def recipe_lr(config: RunConfig, width: int) -> float:
    """Return the learning rate of published runs, for the batch and the width: by its root below theirs, and one over.

    Weights that have learned are tuned at a tenth, but where the lower layers learn more slowly.
    """
    decays = getattr(config.optimizer, "layer_decay", 1) < 1
    tuned = getattr(config, "init", None) and getattr(config, "tune", "all") == "all" and not decays
    batch = min(1, config.train.global_batch_size / LR_BATCH)
    return LR * math.sqrt(batch) * max(1, LR_WIDTH / width) * (0.1 if tuned else 1)


def _leak(source: Source, found: Measured, other: Source) -> str:
    """Say so where held-out data holds what is trained on."""
    mend = "its figures say nothing of new images; name held-out data with --data.eval"
    if {part.fingerprint for part in source.parts} & {part.fingerprint for part in other.parts}:
        return f"{other.name} is evaluated on and trained on: {mend}"
    shared, compared = 0, 0
    for index in () if other.remote else _while_there_is_time(chosen_indices(other, COMPARED, 0)):
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
