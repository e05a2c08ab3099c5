"""Mixtures of images and their labels: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019)."""

import torch
from torch import nn


class Mixing(nn.Module):
    """Mix each batch with a permutation of itself; of the two methods given, one is drawn for each batch.

    Args:
        mixup, cutmix: the alpha of the Beta distribution that shares are drawn from; 0 leaves the method out.

    Draws come from torch's global generator.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        super().__init__()
        from torchvision.transforms import v2  # takes longer to import than all that lies here

        methods = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        methods += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
        self.methods = methods

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) and (B,) int64 to mixed pixels and, where anything mixes, probabilities (B, C)."""
        if not self.methods:
            return pixels, labels
        return self.methods[int(torch.rand(()) * len(self.methods))](pixels, labels)
