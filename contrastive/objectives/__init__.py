"""What a run can learn beside the contrastive loss, by name: one file each."""

from contrastive.objectives.caption import CaptionConfig
from contrastive.objectives.distill import DistillConfig
from contrastive.objectives.hard_negatives import HardNegativesConfig
from contrastive.objectives.masked import MaskedConfig
from contrastive.objectives.objective import Objective, ObjectiveConfig, Setting
from contrastive.objectives.patch_distill import PatchDistillConfig
from contrastive.objectives.patch_mean import PatchMeanConfig
from contrastive.objectives.self_distill import SelfDistillConfig
from contrastive.objectives.slip import SlipConfig
from contrastive.registry import Registry

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Setting"]

OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry("objective")
OBJECTIVES.register("caption")(CaptionConfig)
OBJECTIVES.register("distill")(DistillConfig)
OBJECTIVES.register("self_distill")(SelfDistillConfig)
OBJECTIVES.register("masked")(MaskedConfig)
OBJECTIVES.register("patch_distill")(PatchDistillConfig)
OBJECTIVES.register("patch_mean")(PatchMeanConfig)
OBJECTIVES.register("slip")(SlipConfig)
OBJECTIVES.register("hard_negatives")(HardNegativesConfig)
