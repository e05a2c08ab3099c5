"""What is watched while a run trains, and what is done when it goes wrong: the options."""

from dataclasses import dataclass

from contrastive.option_types import Positive


@dataclass(frozen=True)
class HealthConfig:
    """How a run notices that it goes wrong, and what it does then."""

    hang_after: Positive[float] = 200.0
    """Seconds without the end of a step after which the stacks of all threads are written to stacks/ in the run folder;
    best below data.timeout. While it starts, evaluates or saves, at least two thirds of health.patience."""
    patience: Positive[float] = 3600.0
    """Seconds that ranks wait for one another while the run starts, evaluates or saves; in a step data.timeout."""
