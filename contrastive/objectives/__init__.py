"""What a run can learn beside the contrastive loss, by name: one file each, read where it is chosen."""

from contrastive.objectives.objective import Objective, ObjectiveConfig, Setting
from contrastive.registry import Registry

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Setting"]

OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry(
    "objective",
    {
        "caption": "contrastive.objectives.caption:CaptionConfig",
        "distill": "contrastive.objectives.distill:DistillConfig",
        "self_distill": "contrastive.objectives.self_distill:SelfDistillConfig",
        "masked": "contrastive.objectives.masked:MaskedConfig",
        "patch_distill": "contrastive.objectives.patch_distill:PatchDistillConfig",
        "patch_mean": "contrastive.objectives.patch_mean:PatchMeanConfig",
        "slip": "contrastive.objectives.slip:SlipConfig",
        "hard_negatives": "contrastive.objectives.hard_negatives:HardNegativesConfig",
    },
)
