"""scripts/pretrain.py with batches that do harm, whoever takes them: TROUBLE=KIND,FIRST BATCH,BATCHES,DIES AT CALL.

nan: the loss of such a batch is not finite. high: it is 100 more. At that call of the loss, from 1, the process dies.
"""

import os
from dataclasses import dataclass

from contrastive.commands.pretrain_command import main
from contrastive.data.samples import PairDataset
from contrastive.entry import run_script
from contrastive.losses import LOSSES, SigmoidLoss, SigmoidLossConfig

KIND, FIRST, NUMBER, DIES_AT = os.environ["TROUBLE"].split(",")
BATCHES = range(int(FIRST), int(FIRST) + int(NUMBER))
MARK = 12345  # a caption_id, which this loss makes no other use of
plain = PairDataset.__getitem__


def marked(self, position):
    sample = plain(self, position)
    assert self.image_size(self.order.step_of(position)) == sample["image"].shape[-1]
    return sample | {"caption_id": MARK} if position // self.order.global_batch_size in BATCHES else sample


class TroubledLoss(SigmoidLoss):
    calls = 0

    def forward(self, *features, caption_ids):
        self.calls += 1
        if self.calls == int(DIES_AT):
            os._exit(9)
        loss = super().forward(*features)
        if (caption_ids == MARK).any():
            return loss * float("nan") if KIND == "nan" else loss + 100
        return loss


@LOSSES.register("troubled")
@dataclass(frozen=True)
class TroubledLossConfig(SigmoidLossConfig):
    """SigLIP's loss, but for some batches."""

    def build(self):
        return TroubledLoss("negative")


if __name__ == "__main__":
    PairDataset.__getitem__ = marked
    run_script("troubled.py", main)
