"""A teacher that is the exponential moving average of the model (Tarvainen & Valpola 2017, "Mean Teacher")."""

from dataclasses import dataclass

import torch
from torch import nn

from contrastive.distributed.sharding import local
from contrastive.models import DualEncoder
from contrastive.models.image_tower import ImageTower
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting
from contrastive.option_types import Probability


@dataclass(frozen=True)
class SelfTaughtConfig(ObjectiveConfig):
    """The option of the teacher."""

    momentum: Probability[float] = 0.996
    """Share of the teacher that stays in each step; the rest is the student's. Objectives of one momentum share one."""


class EmaTeacher(nn.Module):
    """An image tower that follows the student's: teacher ← m · teacher + (1 − m) · student. It never learns.

    keeper: the objective that moves it, of those that share it the one that begins first.
    """

    def __init__(self, setting: Setting):
        super().__init__()
        self.tower = ImageTower(setting.model.image, setting.model.embed_dim)
        self.keeper = setting.name
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EmaTeacher":
        """It stays in eval mode."""
        return super().train(False)

    def tokens(self, part: MicroBatch) -> torch.Tensor:
        """(b', N, D) of the whole images, class token first where there is one."""
        return part.once(f"tokens of {self.keeper}'s teacher", lambda: self.tower.forward_features(part.pixels))


def follow(teacher: nn.Module, student: nn.Module, momentum: float, skipped: torch.Tensor) -> None:
    """Move the teacher's parameters towards the student's, unless `skipped` (bool, 0-dim)."""
    teachers, students = ([local(p) for p in module.parameters()] for module in (teacher, student))
    moves = torch._foreach_sub(students, teachers)
    torch._foreach_mul_(moves, torch.where(skipped, 0.0, 1 - momentum))
    torch._foreach_add_(teachers, moves)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Make the parameters of `target` those of `source`, which has the same."""
    for to, from_ in zip(target.parameters(), source.parameters(), strict=True):
        local(to).copy_(local(from_))


class SelfTaught(Objective):
    """An objective that learns from the image tower's average; those of a run with one momentum share one teacher."""

    options: SelfTaughtConfig

    def __init__(self, options: SelfTaughtConfig, setting: Setting):
        super().__init__(options, setting)
        setting.check_learns_images()
        others = [one for one in setting.others.values() if isinstance(one, SelfTaught)]
        sharing = [one for one in others if one.options.momentum == options.momentum]
        if sharing:
            # Not registered a second time: its weights are saved once, as the other objective's.
            self._shared = (sharing[0].teacher,)
            if self.first_step < min(one.first_step for one in sharing):
                self.teacher.keeper = setting.name
        else:
            self.own_teacher = EmaTeacher(setting)
            self._shared = (self.own_teacher,)

    @property
    def teacher(self) -> EmaTeacher:
        return self._shared[0]

    def begin(self, model: DualEncoder) -> None:
        if self.teacher.keeper == self.name:
            copy_weights(model.image_tower, self.teacher.tower)

    def after_update(self, model: DualEncoder, skipped: torch.Tensor) -> None:
        if self.teacher.keeper == self.name:
            follow(self.teacher.tower, model.image_tower, self.options.momentum, skipped)
