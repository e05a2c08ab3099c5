"""scripts/pretrain.py with one thing going wrong on one rank, as FAULT says: KIND,RANK,FIRST CALL,CALLS.

sleep: reading that sample never ends. kill: it ends the process that reads. nan: the loss is given an image that is
not finite. die, term: within the loss, SIGKILL or SIGTERM. save-die, save-term: as that, at what the first save
does to the disk (and the loop until the next), counted from its temporary folder on, and named on stderr.
"""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import torch

from contrastive.commands.pretrain_command import main
from contrastive.data.sources.open import SOURCES
from contrastive.entry import run_script
from contrastive.losses import LOSSES, SigmoidLoss, SigmoidLossConfig

KIND, RANK, FIRST, CALLS = os.environ["FAULT"].split(",")
CALLS_GONE_WRONG = range(int(FIRST), int(FIRST) + int(CALLS))
SIGNALS = {"die": signal.SIGKILL, "term": signal.SIGTERM}
TO_THE_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # names of Python's audit events


def goes_wrong(kind: str, call: int) -> bool:
    return kind == KIND and os.environ.get("RANK", "0") == RANK and call in CALLS_GONE_WRONG


def tell(what: str) -> None:
    os.write(2, f"fault: {what} at {time.time():.3f}\n".encode())


class FaultyLoss(SigmoidLoss):
    calls = 0

    def forward(self, image_features, *args, **kwargs):
        self.calls += 1
        if goes_wrong("nan", self.calls):
            image_features = image_features * torch.nan
        for kind, number in SIGNALS.items():
            if goes_wrong(kind, self.calls):
                os.kill(os.getpid(), number)
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
            tell("a killed process")
            os.kill(os.getpid(), signal.SIGKILL)
        while goes_wrong("sleep", calls):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits 30 seconds before it kills this rank
            tell("sleep")
            time.sleep(1000)
        return read(self, index)

    type(source).__getitem__ = slow
    return source


def watch_saves() -> None:
    """Send the signal at an operation on the disk: before it is done, whatever code asks for it."""
    operations, temporaries = 0, set()

    def watch(event: str, args: tuple) -> None:
        nonlocal operations
        path = str(args[0]) if args and event in TO_THE_DISK else ""
        within = "/checkpoints" in path or (operations and not path.startswith("/"))  # rmtree names files alone
        if event == "os.mkdir" and re.search(r"/checkpoints/\.tmp-step-\d+$", path):
            temporaries.add(path)
        if not path or not within or len(temporaries) != 1:
            return
        operations += 1
        if goes_wrong(KIND, operations):
            tell(f"operation {operations}: {event} {path.rpartition('/checkpoints/')[2]}")
            os.kill(os.getpid(), SIGNALS[KIND.removeprefix("save-")])

    sys.addaudithook(watch)


if __name__ == "__main__":
    if KIND.startswith("save-"):
        watch_saves()
    run_script("faulty.py", main)
