"""scripts/pretrain.py with one thing going wrong on one rank, as FAULT says: KIND,RANK,FIRST CALL,CALLS.

sleep: reading that sample never ends. kill: it ends the process that reads. nan: the loss is given an image that is
not finite.
"""

import os
import signal
import time
from dataclasses import dataclass

import torch

from contrastive.data.sources.open import SOURCES
from contrastive.log import run_script
from contrastive.losses import LOSSES, SigmoidLoss, SigmoidLossConfig
from scripts.pretrain import main

KIND, RANK, FIRST, CALLS = os.environ["FAULT"].split(",")
CALLS_GONE_WRONG = range(int(FIRST), int(FIRST) + int(CALLS))


def goes_wrong(kind: str, call: int) -> bool:
    return kind == KIND and os.environ.get("RANK", "0") == RANK and call in CALLS_GONE_WRONG


class FaultyLoss(SigmoidLoss):
    calls = 0

    def forward(self, image_features, *args, **kwargs):
        self.calls += 1
        if goes_wrong("nan", self.calls):
            image_features = image_features * torch.nan
        return super().forward(image_features, *args, **kwargs)


@LOSSES.register("faulty")
@dataclass(frozen=True)
class FaultyLossConfig(SigmoidLossConfig):
    """SigLIP's loss, given a bad input now and then."""

    def build(self):
        return FaultyLoss("negative")


@SOURCES.register("faulty")
def open_faulty(argument, columns):
    source = SOURCES.get("digits")(argument, columns)
    read, calls = type(source).__getitem__, 0

    def slow(self, index):
        nonlocal calls
        calls += 1
        if goes_wrong("kill", calls):
            os.kill(os.getpid(), signal.SIGKILL)
        while goes_wrong("sleep", calls):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits 30 seconds before it kills this rank
            time.sleep(1)
        return read(self, index)

    type(source).__getitem__ = slow
    return source


if __name__ == "__main__":
    run_script("faulty.py", main)
