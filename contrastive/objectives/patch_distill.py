"""A patch is to tell what the window around it tells (self-distillation as in CLIPSelf, Wu et al. 2024)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from contrastive.data.extras import DrawnPlaces
from contrastive.errors import UserError
from contrastive.objectives.objective import MicroBatch, Setting, Tensors
from contrastive.objectives.self_taught import PrototypeConfig, PrototypeObjective, at_places
from contrastive.option_types import Positive, Probability


@dataclass(frozen=True)
class PatchDistillConfig(PrototypeConfig):
    """Patches of the whole image learn to be told as the windows around them, cut out, by the model's own average."""

    NOT_NATIVE = "cuts square windows"

    share: Probability[float] = 0.1
    """Share of the patches that learn, drawn for each image; one at least."""
    window: Positive[int] = 5
    """Height and width of a window in patches, an odd number: the patch is in its middle."""

    def build(self, setting: Setting) -> "PatchDistill":
        return PatchDistill(self, setting)


class PatchDistill(PrototypeObjective):
    """See `PatchDistillConfig`. One patch's token, pooled alone, through the head, to the teacher's of its window.

    CLIPSelf takes the boxes of a grid, averages the tokens in each and compares by cosine with a frozen teacher. Here a
    patch stands for itself, so that each has to know what it is part of; and with a teacher that still learns, all
    cosines begin near 1 and pull features together, where prototypes keep them apart.
    """

    def __init__(self, options: PatchDistillConfig, setting: Setting):
        super().__init__(options, setting)
        if options.window % 2 == 0:
            raise UserError(
                f"objectives.{self.name}.window is {options.window}; it has to be odd, as the patch is in its middle"
            )
        if setting.drops_patches:
            raise UserError(f"--objectives {self.name} reads all patches, and patch_dropout drops some; leave one out")
        self.extra = DrawnPlaces(self.name, self.first_step, options.share, setting.model.image.patch_size)

    def targets(self, part: MicroBatch, inputs: Tensors) -> dict[str, torch.Tensor]:
        seen = windows(part.pixels, inputs["places"], self.options.window, self.extra.patch_size)
        told = self.teacher_head(self.teacher.tower(seen.flatten(0, 1), project=False))
        return {"prototypes": told.unflatten(0, seen.shape[:2])}

    def loss(self, part: MicroBatch, inputs: Tensors, targets: Tensors) -> torch.Tensor:
        tower, tokens = part.model.image_tower, at_places(self.patches_of(part.patches), inputs["places"])
        if tower.config.pool == "attention":  # a mean of one patch is the patch
            tokens = tower.head(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        return self.cross_entropy(self.head(tokens), targets["prototypes"])

    def describe(self) -> str:
        window = f"windows of {self.options.window} patches a side"
        return f"{self.options.share:.0%} of the patches as {window}, to {self.options.prototypes:,} prototypes, "


def windows(pixels: torch.Tensor, places: torch.Tensor, size: int, patch: int) -> torch.Tensor:
    """Pixels (b, 3, S, S) around patches, int64 (b, M), to (b, M, 3, s, s), s pixels being `size` patches, or S.

    A window ends where the image does; what is left of it is stretched to its size, bilinearly.
    """
    grid = pixels.shape[-1] // patch
    pixels_out = min(size, grid) * patch
    steps = (torch.arange(pixels_out, device=pixels.device, dtype=pixels.dtype) + 0.5) / pixels_out

    def along(middle: torch.Tensor) -> torch.Tensor:
        """(b, M) to (b, M, s): where to read, from -1 to 1, the image's ends."""
        first, last = (middle - size // 2).clamp(min=0), (middle + size // 2 + 1).clamp(max=grid)
        return (first[..., None] + (last - first)[..., None] * steps) * (2 / grid) - 1

    rows, columns = along(places // grid), along(places % grid)
    where = torch.stack(torch.broadcast_tensors(columns[:, :, None], rows[..., None]), dim=-1)  # (b, M, s, s, 2)
    read = F.grid_sample(pixels, where.flatten(1, 2), padding_mode="border", align_corners=False)  # (b, 3, M·s, s)
    return read.unflatten(2, (-1, pixels_out)).transpose(1, 2)
