"""A loss of your own, registered from outside the package: `--loss margin`, with its options in --help-all and YAML.

python examples/own_loss.py
accelerate launch examples/own_loss.py         # several processes: the loss gathers the texts of all ranks

86 s of one core: acc@1 51 % of 64 classes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from contrastive.distributed.collectives import all_gather_with_grad
from contrastive.entry import run
from contrastive.losses import LOSSES


class MarginLoss(nn.Module):
    """A hinge: each wrong text should be less like the image than its own, by a margin."""

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, caption_ids=None):
        # Features are (B/W, E), this rank's rows, of length 1; the texts of all W ranks are its candidates.
        similarity = logit_scale * image_features @ all_gather_with_grad(text_features).T  # (B/W, B)
        own = logit_scale * (image_features * text_features).sum(dim=1, keepdim=True)  # (B/W, 1)
        per_image = torch.relu(self.margin + similarity - own).sum(dim=1)
        return (per_image - self.margin).mean()  # the own text's term is the margin itself


@LOSSES.register("margin")
@dataclass(frozen=True)
class MarginLossConfig:
    """A hinge on every wrong pair."""

    margin: float = 0.2
    """Distance wanted between right and wrong pairs."""
    duplicates: str = "negative"
    max_logit_scale: float | None = None

    def initial_logits(self, global_batch_size):
        return 1.0, None  # the first factor on the cosines; no bias

    def chance_loss(self, global_batch_size):
        return (global_batch_size - 1) * self.margin  # all similarities equal: told at the start, and where it stays

    def build(self):
        return MarginLoss(self.margin)


def main(work: Path, *flags: str) -> None:
    """Train with it; flags are those of `contrastive pretrain`."""
    loss = ["--loss", "margin", "--loss.margin", "0.3", "--optimizer.logit_lr_factor", "1"]
    run("pretrain", ["--data", "scenes", *loss, "--train.steps", "200", "--out", str(work / "run"), *flags])
    run("zero-shot", [str(work / "run"), "--data", "scenes:test", "--limit", "640"])


if __name__ == "__main__":
    main(Path("runs/own_loss"), *sys.argv[1:])
