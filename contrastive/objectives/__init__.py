"""What a run can learn beside the contrastive loss, by name: one file each."""

from contrastive.objectives.distill import DistillConfig
from contrastive.objectives.objective import Objective, ObjectiveConfig, Setting
from contrastive.registry import Registry

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Setting"]

OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective")
OBJECTIVES.register("distill")(DistillConfig)
