"""Distillation: a model learns how its teachers compare images with texts, and where they put each."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from contrastive.errors import UserError
from contrastive.models import Features
from contrastive.objectives.objective import MicroBatch, Objective, ObjectiveConfig, Setting, Tensors
from contrastive.option_types import NotNegative, Positive

SIDES = ("image", "text")


@dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
    """Learn from teachers: how they compare the images with the texts of a batch (MobileCLIP, TinyCLIP)."""

    NEEDS_DATA = "live teachers take their own memory and time, stored ones none"

    NOT_NATIVE = "shows teachers square views"

    teacher: tuple[str, ...] = ()
    """Teachers: models, or folders that contrastive embed --views wrote; several are an ensemble."""
    scale: tuple[Positive[float], ...] = ()
    """Factor on the similarities of each teacher; none: its own logit scale. Smaller: softer targets."""
    feature_weight: NotNegative[float] = 0.0
    """Weight, within this objective, of 1 - cosine between the model's embeddings and each teacher's."""
    project: bool = False
    """Map the model's embeddings to each teacher's by a linear layer for that, as has to be where widths differ."""

    def build(self, setting: Setting) -> "Distill":
        return Distill(self, setting)


class Distill(Objective):
    """The affinity loss over the global batch, and the distance between embeddings where it has a weight.

    The teachers are no modules of it: neither trained nor saved. Checkpoints hold their keys, and go on with no others.
    """

    reads = "texts"

    def __init__(self, options: DistillConfig, setting: Setting):
        super().__init__(options, setting)
        from contrastive.objectives.teachers import TeacherInputs, open_teacher  # which only runs with teachers need

        section = f"objectives.{setting.name}"
        if not options.teacher:
            raise UserError(f"{section} has no teacher: give --{section}.teacher MODEL, or a folder of stored views")
        if options.scale and len(options.scale) != len(options.teacher):
            raise UserError(f"{section}.scale has {len(options.scale)} numbers for {len(options.teacher)} teachers")
        if options.project and not options.feature_weight:
            raise UserError(f"{section}.project is for {section}.feature_weight, which is 0: give it, or leave it out")
        self.teachers = [open_teacher(path, setting) for path in options.teacher]
        self.scales = options.scale or [one.logit_scale for one in self.teachers]
        self.extra = TeacherInputs(setting.name, self.first_step, self.teachers)
        self.heads = nn.ModuleList()
        width = setting.model.embed_dim
        for one in self.teachers:
            if options.project:
                self.heads.append(nn.ModuleDict({side: nn.Linear(width, one.embed_dim) for side in SIDES}))
            elif options.feature_weight and one.embed_dim != width:
                raise UserError(
                    f"teacher {one.path} has {one.embed_dim} channels, the model {width}: {section}.feature_weight "
                    f"needs a linear layer between them, --{section}.project, or --model.embed_dim {one.embed_dim}"
                )

    def get_extra_state(self) -> torch.Tensor:
        """Digests of the teachers' keys, uint8 (teachers, 32): what checkpoints hold of them."""
        digests = [list(hashlib.sha256(one.key.encode()).digest()) for one in self.teachers]
        return torch.tensor(digests, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise UserError(
                f"the teachers of objectives.{self.name} are not those that the checkpoint was trained with: give the "
                f"same, wherever they are now, with --objectives.{self.name}.teacher"
            )

    def targets(self, run: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Embeddings of teacher k: 'k.image' (b', F), 'k.text' (b', K, F)."""
        found = {}
        for k, one in enumerate(self.teachers):
            own = {name.removeprefix(f"{k}."): value for name, value in inputs.items() if name.startswith(f"{k}.")}
            found[f"{k}.image"], found[f"{k}.text"] = one.embeddings(own)
        return found

    def loss(self, run: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor | None:
        """The mean of 1 - cosine over teachers, images and texts: half the squared distance of unit vectors."""
        if not self.options.feature_weight:
            return None
        distances = []
        for k in range(len(self.teachers)):
            for side in SIDES:
                own, theirs = getattr(run.features, side), targets[f"{k}.{side}"]
                mapped = self.heads[k][side](own) if self.heads else own
                distances.append(1 - cosine_similarity(mapped, theirs.reshape(len(own), -1), dim=1).mean())
        return self.options.feature_weight * torch.stack(distances).mean()

    def loss_of_batch(self, features: Features, more: Tensors, targets: Tensors) -> torch.Tensor:
        """The affinity loss; of K captions of an image the mean."""
        from contrastive.losses.affinity import AffinityLoss, TeacherFeatures

        texts = features.text if features.text.ndim == 3 else features.text[:, None]
        losses = []
        for caption, text in enumerate(texts.unbind(1)):
            taught = [
                TeacherFeatures(targets[f"{k}.image"], targets[f"{k}.text"][:, caption], scale)
                for k, scale in enumerate(self.scales)
            ]
            losses.append(AffinityLoss()(features.image, text, features.logit_scale, taught))
        return sum(losses) / len(losses)

    def describe(self) -> str:
        each = zip(self.teachers, self.scales, strict=True)
        told = [f"{one.path} ({one.embed_dim} channels, scale {scale:.3g})" for one, scale in each]
        return f"taught by {', '.join(told)}, "
