"""Pretraining as a task: pairs in, one contrastive loss over the global batch."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from contrastive.data.order import SampleOrder
from contrastive.data.pairs import PairDataset
from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate.examples import collect_examples
from contrastive.interop.bundle import save_model
from contrastive.models import DualEncoder
from contrastive.train.evaluation import evaluate
from contrastive.train.settings import PretrainConfig, num_distinct
from contrastive.train.step import forward_backward
from contrastive.train.task import Task, millions


class ContrastiveTask(Task):
    """A dual encoder that learns from the pairs of `source`.

    Args:
        config: resolved, see `settings.resolve`.
        held_out: evaluated; labelled ones zero-shot, captioned ones by retrieval.
    """

    advice = (
        "check that captions fit their images (report.html shows pairs), try a lower optimizer.lr or a longer "
        "schedule.warmup_steps, and --loss.duplicates positive if many captions are identical"
    )

    def __init__(self, config: PretrainConfig, source: Source, tokenizer: Tokenizer, held_out: list[Source]):
        self.config, self.source, self.tokenizer, self.held_out = config, source, tokenizer, held_out
        torch.manual_seed(config.train.seed)
        self.model = DualEncoder(config.model)
        if config.lock == "image":
            self.model.image_tower.requires_grad_(False).eval()
        self.preprocess = Preprocess(config.data.preprocess(config.model.image.image_size))
        self.loss = config.loss.build()
        batch = config.train.global_batch_size
        # With many matches in a row the loss of guessing is another one for each loss: no advice is given then.
        few = num_distinct(config.loss, source, batch) < batch
        self.chance_loss = math.inf if few else config.loss.chance_loss(batch)

    def dataset(self, order: SampleOrder) -> PairDataset:
        data = self.config.data
        size, seed = self.config.model.image.image_size, self.config.train.seed
        return PairDataset(self.source, order, self.tokenizer, size, data.augment, seed, data.caption_templates)

    def forward_backward(self, wrapped: nn.Module, batch: dict, step: int, runtime: Runtime) -> torch.Tensor:
        device, train = runtime.device, self.config.train
        return forward_backward(
            wrapped,
            self.loss,
            self.preprocess.normalize(batch["image"].to(device, non_blocking=True)),
            batch["tokens"].to(device, non_blocking=True),
            batch["caption_id"].to(device, non_blocking=True),
            accumulate=train.accumulate,
            seed=(train.seed, step),
            runtime=runtime,
        )

    def after_update(self) -> None:
        if self.config.loss.max_logit_scale is not None:
            self.model.logit_scale.clamp_(max=math.log(self.config.loss.max_logit_scale))

    def figures(self) -> dict[str, float | None]:
        bias = self.model.logit_bias
        return {
            "logit_scale": self.model.logit_scale.exp().item(),
            "logit_bias": None if bias is None else bias.item(),
        }

    def evaluate(self, runtime: Runtime) -> dict[str, float]:
        return evaluate(self, self.held_out, self.config.evaluation, runtime)

    def save(
        self, folder: Path, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        save_model(folder, weights, self.model.config, self.preprocess.config, self.tokenizer, ema)

    def describe(self) -> list[tuple[str, str]]:
        image, text = self.config.model.image, self.config.model.text
        locked = ", locked" if self.config.lock == "image" else ""
        return [
            (
                "image tower",
                f"{millions(self.model.image_tower)}: {image.image_size} px, patch {image.patch_size}, "
                f"width {image.width}, depth {image.depth}{locked}",
            ),
            (
                "text tower",
                f"{millions(self.model.text_tower)}: {text.vocab_size:,} tokens, length {text.context_length}, "
                f"width {text.width}, depth {text.depth}",
            ),
        ]

    def report(self, device: torch.device) -> dict:
        shown = self.held_out[-1] if self.held_out else self.source
        return collect_examples(self.model, shown, self.preprocess, self.tokenizer, device)
