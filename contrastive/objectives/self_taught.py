"""A teacher that is the exponential moving average of the model (Tarvainen & Valpola 2017, "Mean Teacher").

Beside it are heads with prototypes, by which self_distill, masked and patch_distill compare what student and teacher
see. A head tells for a feature to which of K prototypes it belongs; the student's head is to say of what it sees what
the teacher's says of the whole image (Caron et al. 2021, "DINO"; Zhou et al. 2022, "iBOT").
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from contrastive.distributed.collectives import all_reduce_max, all_reduce_sum, world_size
from contrastive.distributed.sharding import local
from contrastive.models import DualEncoder
from contrastive.models.image_tower import ImageTower
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting
from contrastive.option_types import Positive, Probability

CENTER_DECAY = 0.9
SINKHORN_ROUNDS = 3


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


@dataclass(frozen=True)
class PrototypeConfig(SelfTaughtConfig):
    """The options of a head with prototypes and of the teacher that it learns from."""

    prototypes: Positive[int] = 4096
    """K: among how many a feature is told apart."""
    hidden: Positive[int] = 2048
    """Channels of the head's two hidden layers."""
    bottleneck: Positive[int] = 256
    """Channels in which features and prototypes are compared."""
    student_temperature: Positive[float] = 0.1
    """What the student's cosines are divided by."""
    teacher_temperature: Positive[float] = 0.04
    """Likewise the teacher's; the lower, the more certain it is."""
    balance: Literal["center", "sinkhorn"] = "center"
    """What keeps all features from one prototype: their running mean taken off (DINO), or assignments that use all
    prototypes alike in each global batch (SwAV, DINOv2)."""


def three_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return the MLP of a head, (..., width) to (..., out), with two hidden layers."""
    layers = (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out))
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """Features (..., D) to cosines with K prototypes (..., K): an MLP of three layers, unit length, unit prototypes."""

    def __init__(self, width: int, options: PrototypeConfig):
        super().__init__()
        self.mlp = three_layers(width, options.hidden, options.bottleneck)
        self.prototypes = nn.Parameter(torch.empty(options.prototypes, options.bottleneck))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class PrototypeObjective(SelfTaught):
    """A student's head that learns from its own average, and the targets that it learns."""

    def __init__(self, options: PrototypeConfig, setting: Setting):
        super().__init__(options, setting)
        self.head = PrototypeHead(setting.model.image.width, options)
        self.teacher_head = PrototypeHead(setting.model.image.width, options).requires_grad_(False)
        self.register_buffer("center", torch.zeros(options.prototypes))
        self._next_center: torch.Tensor | None = None  # once the step is done

    def begin(self, model: DualEncoder) -> None:
        super().begin(model)
        copy_weights(self.head, self.teacher_head)

    def after_update(self, model: DualEncoder, skipped: torch.Tensor) -> None:
        super().after_update(model, skipped)
        follow(self.teacher_head, self.head, self.options.momentum, skipped)
        if self._next_center is not None:
            self.center.copy_(torch.where(skipped, self.center, self._next_center))

    def patches_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (b', N, D) without the class token."""
        return tokens[:, self.teacher.tower.num_prefix_tokens :]

    def whole_targets(self, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = targets["prototypes"]  # (b, K) or (b, M, K)
        return {"prototypes": self.probabilities(logits.flatten(0, -2)).view_as(logits)}

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of this rank (n, K), as many on each, to probabilities (n, K), over the global batch."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        temperature = self.options.teacher_temperature
        if self.options.balance == "sinkhorn":
            return sinkhorn(logits / temperature)
        mean = all_reduce_sum(logits.mean(dim=0)) / world_size()
        self._next_center = self.center.lerp(mean.to(self.center.dtype), 1 - CENTER_DECAY)
        return ((logits - self.center) / temperature).softmax(dim=-1)

    def cross_entropy(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """The student's logits (..., K) and what it is to say, (..., K), to a mean over all rows."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        told = (logits / self.options.student_temperature).log_softmax(dim=-1)
        return -(probabilities * told).sum(dim=-1).mean()


def sinkhorn(logits: torch.Tensor) -> torch.Tensor:
    """Rows (n, K) of every rank to probabilities that use all K alike, nearly: rows and columns normalised in turn.

    In logarithms; source: Caron et al. 2020, "SwAV", algorithm 1.
    """
    rows = logits.shape[0] * world_size()
    for _ in range(SINKHORN_ROUNDS):
        largest = all_reduce_max(logits.amax(dim=0))
        columns = all_reduce_sum((logits - largest).exp().sum(dim=0)).log() + largest
        logits = (logits - columns + math.log(rows / logits.shape[1])).log_softmax(dim=1)
    return logits.exp()


def at_places(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What (b', N, D) has at these patches, int64 (b', M): (b', M, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
