"""Pretraining of an image tower by objectives alone, without a contrastive loss: as CapPa, with captions."""

import torch

from contrastive.data.record import Source
from contrastive.data.tokenizer import Tokenizer
from contrastive.errors import UserError
from contrastive.objectives.learner import ImageLearner
from contrastive.train.contrastive_task import ContrastiveTask, PretrainConfig
from contrastive.train.options import parts_of_batch
from contrastive.train.task import Inputs

CAPTION = "caption"


class ImageTask(ContrastiveTask):
    """An image tower and objectives that train it; the run gives an image model, and what its objectives keep.

    Args:
        config: resolved, with `loss` none.
        held_out: evaluated by what the decoder writes of them, see `captioning`.
    """

    advice = "check that captions fit their images (report.html shows pairs), or try another optimizer.lr"
    chooses = False

    def __init__(self, config: PretrainConfig, source: Source, tokenizer: Tokenizer, held_out: list[Source]):
        super().__init__(config, source, tokenizer, held_out)
        for name, one in self.objectives.items():
            if one.reads == "texts":
                raise UserError(f"--objectives {name} is of a text tower's embeddings, which --loss none has not")
        image = config.model.image
        if all(one.reads == "patches" for one in self.objectives.values()):
            mend = "nothing trains it with --loss none and objectives of patches alone"
            if image.pool == "attention":
                raise UserError(f"model.image.pool attention: {mend}; use average")
            if image.projection:
                raise UserError(f"model.image.projection true: {mend}; use false")
        if held_out:
            from contrastive.evaluate.captioning import scorers

            if CAPTION not in self.objectives:
                raise UserError("data.eval is scored by captions with --loss none: add --objectives caption")
            scorers()

    def new_model(self, config: PretrainConfig) -> ImageLearner:
        return ImageLearner(config.model)

    def inputs(self, batch: dict) -> Inputs:
        inputs = {
            "image": batch["image"],
            "caption_id": batch["caption_id"],
            "objectives": self.objective_inputs(batch),
        }
        return inputs | {"texts": [torch.empty(0)] * parts_of_batch(self.config.train, batch)}

    def figures(self) -> dict[str, torch.Tensor | None]:
        return {}

    def score(self, source: Source, **how) -> tuple[str, dict[str, float]]:
        """`captions` named, bleu4, cider of a source, greedily."""
        from contrastive.evaluate.captioning import captioning
        from contrastive.evaluate.embeddings import evaluating
        from contrastive.objectives.captioner import Captioner

        with evaluating(self.model):
            captioner = Captioner(self, self.objectives[CAPTION].decoder, self.tokenizer)
            result = captioning(captioner, source, **how)
        return "captions", {name: value for name, value in result.items() if isinstance(value, float)}

    def report(self, device: torch.device) -> dict:
        return {}
