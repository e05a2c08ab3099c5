"""Pretraining as a task: its options, its loss over the global batch of pairs, a step's gradient."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from contrastive import models
from contrastive.data.order import SampleOrder
from contrastive.data.record import Source
from contrastive.data.samples import PairDataset
from contrastive.data.settings import DataConfig
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.runtime import Runtime
from contrastive.errors import UserError
from contrastive.interop.bundle import save_model
from contrastive.losses import LOSSES, LossConfig, NoLossConfig, SoftmaxLossConfig
from contrastive.models import DualEncoder, ModelConfig
from contrastive.named_sections import Chosen, by_name, preset, several, slot
from contrastive.objectives import OBJECTIVES, Objective, Setting
from contrastive.objectives.learner import Learner, Learning, objective_weights, own_weights, save_objectives
from contrastive.option_types import NotNegative
from contrastive.train.gradient import Batch, forward_backward
from contrastive.train.options import RunConfig, check_run, parts_of_batch, resolve_run
from contrastive.train.task import Inputs, Losses, TrainingTask, Weights, describe_image_tower, millions


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything a pretraining run can be told."""

    RENAMED = RunConfig.RENAMED | {
        "loss.init_scale": "model.init_logit_scale",
        "loss.init_bias": "model.init_logit_bias",
    }

    SHORT_FLAGS = RunConfig.SHORT_FLAGS | {"teacher": "objectives.distill.teacher"}

    loss: LossConfig = slot(LOSSES, "sigmoid")
    model: ModelConfig = preset(lambda name: models.model_config(name), ModelConfig, lambda: models.model_table())
    data: DataConfig = field(default_factory=DataConfig)
    between_captions: NotNegative[float] = 0.0
    """Weight of the same loss between each two captions of an image, which data.captions_per_image brings together; 0.3
    to 1 where captions are few."""
    all_captions: bool = False
    """The captions of an image in a step are all its matches in one softmax loss, instead of one in each of several."""
    init: str | None = None
    """Start from this model's weights, with its architecture, tokenizer and preprocessing: a run or model folder."""
    init_image: str | None = None
    """Start the image tower from this model or classifier; the text tower starts at random."""
    objectives: Chosen = several(OBJECTIVES)
    """What to learn beside the contrastive loss."""
    lock: Literal["none", "image"] = "none"
    """image: train the text tower alone (LiT, Zhai et al. 2022), against the image tower of init_image or init."""

    @property
    def loss_name(self) -> str:
        return LOSSES.name_of(type(self.loss))

    def short_name(self) -> str:
        return self.loss_name


def check(config: PretrainConfig) -> None:
    """Raise UserError for options that no data can make right."""
    check_run(config)
    if not (config.init or config.init_image):  # which bring their own
        config.model.image.check()
    if config.model.init_logit_bias is not None and config.loss.initial_logits(2)[1] is None:
        raise UserError("model.init_logit_bias is for losses with a bias (sigmoid); leave it out")
    of_several = {"data.spread_captions": config.data.spread_captions}
    of_several |= {name: getattr(config, name) for name in ("between_captions", "all_captions")}
    for name, asked in of_several.items():
        if asked and config.data.captions_per_image == 1:
            raise UserError(f"{name} needs several captions of an image in a step: give --data.captions_per_image")
    if config.all_captions and not isinstance(config.loss, SoftmaxLossConfig):
        mend = "sigmoid's sums over all pairs, and so has all captions already" if config.loss_name == "sigmoid" else ""
        raise UserError(f"all_captions is for --loss softmax{mend and ': ' + mend}; leave it out")
    if isinstance(config.loss, NoLossConfig):
        _check_without_loss(config)
    if config.init and config.init_image:
        raise UserError("give --init or --init_image, not both: --init starts both towers")
    if config.lock == "image" and not (config.init or config.init_image):
        raise UserError(
            "--lock image keeps the image tower as it is: say whose with --init_image MODEL or --init MODEL"
        )


def _check_without_loss(config: PretrainConfig) -> None:
    if not any(one.start == 0 for one in by_name(config.objectives).values()):
        raise UserError("--loss none learns by objectives alone, one of which starts at 0: give --objectives caption")
    if config.init:
        raise UserError("--loss none has no text tower to start: use --init_image")
    if config.between_captions:
        raise UserError("between_captions has no effect with --loss none; leave it out")


def resolve(config: PretrainConfig, source: Source, tokenizer: Tokenizer) -> PretrainConfig:
    """Fill in what follows from the data and the tokenizer.

    Raises:
        UserError: the tokenizer does not fit the model, options do not fit together, or there are fewer samples than
            one batch.
    """
    config = resolve_run(config, source, config.model.image)
    _check_objectives(config)
    loss, model = config.loss, config.model
    if loss.duplicates == "auto":
        named = any(part.class_names for part in source.parts)
        loss = replace(loss, duplicates="positive" if named else "negative")
    for name in ("between_captions", "all_captions"):
        if getattr(config, name) and loss.duplicates != "negative":
            raise UserError(
                f"{name} with loss.duplicates {loss.duplicates}: captions of an image differ, and match; use "
                f"--loss.duplicates negative, or leave {name} out"
            )
    scale, bias = loss.initial_logits(num_distinct(loss, source, config.train.global_batch_size))
    model = replace(
        model,
        text=_fit_text(model, tokenizer),
        init_logit_scale=scale if model.init_logit_scale is None else model.init_logit_scale,
        init_logit_bias=bias if model.init_logit_bias is None else model.init_logit_bias,
    )
    if isinstance(loss, NoLossConfig) and not model.image.projection:
        model = replace(model, embed_dim=model.image.width)
    return replace(config, model=model, loss=loss)


def _check_objectives(config: PretrainConfig) -> None:
    for name, own in by_name(config.objectives).items() if config.model.image.native else ():
        if own.NOT_NATIVE:
            raise UserError(f"--objectives {name} {own.NOT_NATIVE}, which is not for model.image.native; leave one out")


def num_distinct(loss: LossConfig, source: Source, global_batch_size: int) -> int | float:
    """Return how many captions of a batch differ in the eyes of the loss, as far as that is known beforehand.

    It is 1 / p, at most the batch, where p is the probability that a text of a batch matches an image of it, either
    drawn at random. Of C classes prompted alike, where equal ones are matches, it is C.
    """
    if loss.duplicates != "positive":
        return global_batch_size
    # Two draws agree on class c with probability q_c ** 2. Other captions count as all different: a match is then the
    # image's own text, one of the batch. In fractions, so that C classes give C and not nearly C.
    share_of_class, share_of_captions = Counter(), Fraction(0)
    for part, weight in zip(source.parts, source.weights, strict=True):
        share = Fraction(weight, sum(source.weights))
        if part.prompted:
            for name in part.class_names:  # one name in two parts is one class, as Record.caption_group has it
                share_of_class[name] += share / len(part.class_names)
        else:
            share_of_captions += share
    matching = sum(q**2 for q in share_of_class.values()) + share_of_captions / global_batch_size
    distinct = min(Fraction(global_batch_size), 1 / matching)
    return int(distinct) if distinct.denominator == 1 else float(distinct)


def _fit_text(model: ModelConfig, tokenizer: Tokenizer):
    text = model.text
    if text.vocab_size is not None and text.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.text.vocab_size {text.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"give --model.text.vocab_size {tokenizer.vocab_size}, or the model's own tokenizer with --data.tokenizer"
        )
    for name in ("eos_id", "pad_id"):
        ours, theirs = getattr(text, name), getattr(tokenizer, name)
        if ours is not None and ours != theirs:
            raise UserError(
                f"model.text.{name} is {ours}, but the tokenizer's is {theirs}; set --model.text.{name} {theirs}, "
                "or use the model's own tokenizer (--data.tokenizer)"
            )
    vocab_size = tokenizer.vocab_size if text.vocab_size is None else text.vocab_size
    return replace(text, vocab_size=vocab_size, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


class ContrastiveTask(TrainingTask):
    """A dual encoder that learns from the pairs of `source`.

    Args:
        config: resolved, see `resolve`.
        held_out: evaluated; labelled ones zero-shot, captioned ones by retrieval.
    """

    advice = (
        "check that captions fit their images (report.html shows pairs), try a lower optimizer.lr or a longer "
        "schedule.warmup_steps, and --loss.duplicates positive if many captions are identical"
    )

    def __init__(self, config: PretrainConfig, source: Source, tokenizer: Tokenizer, held_out: list[Source]):
        torch.manual_seed(config.train.seed)
        model = self.new_model(config)
        if config.lock == "image":
            model.image_tower.requires_grad_(False).eval()
        super().__init__(config, model, source, held_out)
        self.tokenizer = tokenizer
        self.loss = (replace(config.loss, duplicates="positive") if config.all_captions else config.loss).build()
        batch = config.train.global_batch_size
        # With many matches in a row the loss of guessing is another one for each loss: no advice is given then.
        few = num_distinct(config.loss, source, batch) < batch
        self.chance_loss = math.inf if few else config.loss.chance_loss(batch) * (1 + config.between_captions)
        if config.all_captions:  # one of B·K texts for half of the loss
            self.chance_loss += math.log(config.data.captions_per_image) / 2
        for name, own in by_name(config.objectives).items():
            self.model.objectives[name] = built = own.build(self._setting(name))
            if own.keep and next(built.parameters(), None) is None:
                raise UserError(f"objectives.{name}.keep: it has no modules that could be kept; leave it out")

    def new_model(self, config: PretrainConfig) -> nn.Module:
        """Return the model with fresh weights, its objectives still to come."""
        return Learner(config.model) if by_name(config.objectives) else DualEncoder(config.model)

    def _setting(self, name: str) -> Setting:
        config, data = self.config, self.config.data
        sizes, shares_dropped = (tuple(dict.fromkeys(own)) for own in zip(*self.curriculum.settings, strict=True))
        parts = self.source, self.tokenizer, self.preprocess
        varied = data.caption_templates, data.captions_per_image, data.augment
        return Setting(
            *(name, config.model, *parts, config.train.steps, sizes, config.train.global_batch_size, *varied),
            image_column=data.image_column,
            loss=config.loss,
            all_captions=config.all_captions,
            locked=config.lock == "image",
            drops_patches=any(shares_dropped),
            others=self.objectives,
        )

    @property
    def objectives(self) -> dict[str, Objective]:
        return dict(self.model.objectives.items()) if isinstance(self.model, Learning) else {}

    def dataset(self, order: SampleOrder) -> PairDataset:
        data, size = self.config.data, self.image_size(order)
        captions = data.caption_templates, data.captions_per_image, data.token_dropout
        extras = [one.extra for one in self.objectives.values() if one.extra is not None]
        return PairDataset(
            self.source, order, self.tokenizer, size, data.augment, *captions, extras, data.spread_captions
        )

    def inputs(self, batch: dict) -> Inputs:
        parts = batch["tokens"].chunk(parts_of_batch(self.config.train, batch))
        texts = [self.model.text_tower.pack(part.flatten(0, -2)) for part in parts]
        ids = batch["caption_id"]
        if self.config.all_captions:
            ids = batch["index"][:, None].expand_as(ids)
        inputs = {"image": batch["image"], "texts": texts, "caption_id": ids}
        return inputs | {"objectives": self.objective_inputs(batch)}

    def objective_inputs(self, batch: dict) -> dict[str, dict[str, torch.Tensor]]:
        """Return what of a batch each objective wants, of those that have begun."""
        inputs = {}
        for name, one in self.objectives.items():
            extras = {key.removeprefix(f"{name}."): batch[key] for key in batch if key.startswith(f"{name}.")}
            if extras or one.extra is None:  # else it has not begun
                inputs[name] = one.inputs(batch, extras)
        return inputs

    def forward_backward(self, wrapped: nn.Module, inputs: Inputs, step: int, runtime: Runtime) -> Losses:
        _, self.model.image_tower.patch_dropout = self.curriculum.at(step)
        how = {"between": self.config.between_captions, "all_captions": self.config.all_captions}
        how |= {"seed": (self.config.train.seed, step), "runtime": runtime}
        batch = Batch(self.preprocess.normalize(inputs["image"]), inputs["texts"], inputs["caption_id"])
        if not self.objectives:
            return forward_backward(wrapped, self.loss, batch, **how)
        active = self.model.active(step)
        batch = replace(batch, inputs={name: inputs["objectives"][name] for name in active})
        losses = forward_backward(wrapped, self.loss, batch, objectives=active, **how)
        for parameter in self.model.idle_parameters(active):
            parameter.grad = None  # DDP made zeros, by which the optimizer would decay them
        return losses

    def begins(self, step: int) -> bool:
        return any(one.first_step == step > 0 for one in self.objectives.values())

    def before_step(self, step: int) -> None:
        for one in self.objectives.values():
            if one.first_step == step:
                one.begin(self.model)

    def after_update(self, step: int, skipped: torch.Tensor) -> None:
        for one in self.model.active(step).values() if self.objectives else ():
            one.after_update(self.model, skipped)
        if self.config.loss.max_logit_scale is not None:
            self.model.logit_scale.clamp_(max=math.log(self.config.loss.max_logit_scale))

    def figures(self) -> dict[str, torch.Tensor | None]:
        scale, bias = self.model.logit_scale, self.model.logit_bias
        return {"logit_scale": scale.detach().exp(), "logit_bias": None if bias is None else bias.detach()}

    def score(self, source: Source, **how) -> tuple[str, dict[str, float]]:
        """`zero_shot` acc1, ... of a labelled source; of another `retrieval` image_to_text_r1, ...

        In float32, as the weights are: what contrastive zero-shot will say of the final model.
        """
        from contrastive.evaluate.classification import zero_shot
        from contrastive.evaluate.retrieval import retrieval

        kind, evaluator = ("retrieval", retrieval) if source.class_names is None else ("zero_shot", zero_shot)
        result = evaluator(self, source, **how)
        return kind, {name: value for name, value in result.items() if isinstance(value, float) and name != "chance"}

    def final_weights(self) -> Weights:
        weights = self.model.state_dict()
        kept = [one for one in self.objectives.values() if one.options.keep]
        return own_weights(weights) | objective_weights(weights, kept)

    def save(self, folder: Path, weights: Weights, ema: Weights | None = None) -> None:
        own, average = own_weights(weights), None if ema is None else own_weights(ema)
        save_model(folder, own, self.model.config, self.preprocess.config, self.tokenizer, average)
        save_objectives(folder / "objectives", self.objectives.values(), weights, ema)

    def describe(self) -> list[tuple[str, str]]:
        towers = [describe_image_tower(self.model.image_tower, "locked")]
        if self.loss is not None:
            text = self.config.model.text
            size = f"{text.vocab_size:,} tokens, length {text.context_length}, width {text.width}, depth {text.depth}"
            towers.append(("text tower", f"{millions(self.model.text_tower)}: {size}"))
        return [*towers, *((name, self._described(one)) for name, one in self.objectives.items())]

    def _described(self, objective: Objective) -> str:
        learning = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        size = f"{learning / 1e6:.1f} M beside the model, " if learning else ""
        since = f", from step {objective.first_step:,}" if objective.first_step else ""
        return f"{size}{objective.describe()}weight {objective.options.weight:g}{since}"

    def report(self, device: torch.device) -> dict:
        from contrastive.evaluate.report import collect_examples

        shown = self.held_out[-1] if self.held_out else self.source
        return collect_examples(self.model, shown, self.preprocess, self.tokenizer, device)
