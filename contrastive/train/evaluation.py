"""Evaluation during training: zero-shot on labelled held-out sources, retrieval on captioned ones."""

from dataclasses import dataclass

from contrastive.data.preprocess import Preprocess
from contrastive.data.record import Source
from contrastive.data.sources import open_source
from contrastive.data.tokenizer import Tokenizer
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate.retrieval import retrieval
from contrastive.evaluate.zero_shot import zero_shot
from contrastive.models import DualEncoder
from contrastive.train.settings import PretrainConfig


@dataclass(frozen=True)
class Evaluated:
    """What the evaluators need of a model in training; a Bundle without its path."""

    model: DualEncoder
    preprocess: Preprocess
    tokenizer: Tokenizer


def open_held_out(config: PretrainConfig) -> list[Source]:
    """Open every source of data.eval. A wrong one is a UserError before training starts."""
    data = config.data
    return [
        open_source(spec, image_column=data.image_column, caption_column=data.caption_column, prompts=data.prompts)
        for spec in data.eval
    ]


def evaluate(subject: Evaluated, sources: list[Source], config: PretrainConfig, runtime: Runtime) -> dict[str, float]:
    """Return figures in percent by name, `zero_shot/SOURCE/acc1` and `retrieval/SOURCE/image_to_text_r1`, ...

    Every rank embeds its share and returns the same figures.
    """
    figures = {}
    for source in sources:
        score, kind = (retrieval, "retrieval") if source.class_names is None else (zero_shot, "zero_shot")
        # In float32, as the weights are: what zero_shot.py will say of the final model.
        result = score(
            subject,
            source,
            device=runtime.device,
            batch_size=config.evaluation.batch_size,
            limit=config.evaluation.limit,
        )
        figures |= {
            f"{kind}/{source.name}/{name}": value
            for name, value in result.items()
            if isinstance(value, float) and name != "chance"
        }
    return figures
