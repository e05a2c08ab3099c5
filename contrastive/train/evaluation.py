"""Evaluation during pretraining: zero-shot on labelled held-out sources, retrieval on captioned ones."""

from typing import Any

from contrastive.data.record import Source
from contrastive.distributed.runtime import Runtime
from contrastive.evaluate.retrieval import retrieval
from contrastive.evaluate.zero_shot import zero_shot
from contrastive.train.options import EvaluationConfig


def evaluate(subject: Any, sources: list[Source], options: EvaluationConfig, runtime: Runtime) -> dict[str, float]:
    """Return figures in percent by name, `zero_shot/SOURCE/acc1` and `retrieval/SOURCE/image_to_text_r1`, ...

    Args:
        subject: anything with `model`, `preprocess` and `tokenizer`.

    Every rank embeds its share and returns the same figures.
    """
    figures = {}
    for source in sources:
        score, kind = (retrieval, "retrieval") if source.class_names is None else (zero_shot, "zero_shot")
        # In float32, as the weights are: what zero_shot.py will say of the final model.
        result = score(subject, source, device=runtime.device, batch_size=options.batch_size, limit=options.limit)
        figures |= {
            f"{kind}/{source.name}/{name}": value
            for name, value in result.items()
            if isinstance(value, float) and name != "chance"
        }
    return figures
