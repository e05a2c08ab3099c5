"""scripts/pretrain.py with one save going wrong, as FAULT says: KIND,RANK,SAVE,BYTES.

full: no file of that save can be written beyond so many bytes, by the kernel's word. raise: its writer raises at once,
and the loop goes on when it has. Saves are counted from 1 on; the first is that of step 0.
"""

import os
import resource
from concurrent.futures import wait

from contrastive.commands.pretrain_command import main
from contrastive.entry import run_script
from contrastive.train.saver import CheckpointSaver

KIND, RANK, SAVE, BYTES = os.environ["FAULT"].split(",")
write, save, calls = CheckpointSaver._write, CheckpointSaver.save, []


def faulty_write(self, *args):
    calls.append(args)
    if os.environ["RANK"] != RANK or len(calls) != int(SAVE):
        return write(self, *args)
    if KIND == "raise":
        raise OSError(5, "Input/output error")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(BYTES), hard))
    try:
        return write(self, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def slow_save(self, *args, **how):
    save(self, *args, **how)
    if self._pending is not None:
        wait([self._pending])


if __name__ == "__main__":
    CheckpointSaver._write = faulty_write
    if KIND == "raise":
        CheckpointSaver.save = slow_save
    run_script("faulty_saves.py", main)
