"""Memory that plan.py foretells beside the peak that a training step takes: on a CPU, in float32.

    python benchmarks/plan.py

Each case is measured in fresh processes, as many as it has ranks (DDP over gloo): a tiny model goes through two steps,
which starts the libraries up; Linux's record of the peak is reset; the model is made and takes two steps. What the
resident set grew by at most is the measured peak, of the first rank. Freed tensors leave the process (malloc is told
so). A row for each goes to results/plan.jsonl; one that is more than 15 % off is an error in the end.
"""

import ctypes
import re
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.multiprocessing as mp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import append, run_benchmark

from contrastive.errors import UserError
from contrastive.models import DualEncoder, ModelConfig, model_config
from contrastive.optim import OPTIMIZERS, step_unless
from contrastive.train.options import TrainConfig
from contrastive.train.plan import PlanConfig, count_weights, rank_memory

VOCABULARY = 8192
MOST_OFF = 0.15


@dataclass(frozen=True)
class Case:
    """One model, image size in pixels, pairs of a rank, optimizer, number of ranks."""

    model: str
    image_size: int
    pairs: int
    optimizer: Literal["adamw", "muon"]
    ranks: int = 1


CASES = (
    Case("clip_vit_ti_16", 224, 24, "adamw"),
    Case("siglip_vit_s_16", 112, 32, "adamw"),
    Case("clip_vit_b_32", 224, 16, "adamw"),
    Case("siglip_vit_b_16", 112, 8, "muon"),
    Case("clip_vit_ti_16", 224, 12, "adamw", 2),
    Case("siglip_vit_s_16", 112, 16, "adamw", 2),
    Case("clip_vit_b_32", 224, 8, "muon", 2),
    Case("siglip_vit_b_16", 112, 4, "adamw", 2),
)


@dataclass(frozen=True)
class Options:
    cases: tuple[int, ...] = tuple(range(len(CASES)))
    """Which of the cases, counted from 0."""


def main(options: Options) -> None:
    console, table = Console(), Table("case", "measured GiB", "planned GiB", "planned / measured", box=SIMPLE_HEAD)
    off = []
    for case in track([CASES[number] for number in options.cases], console=console, description="cases"):
        peak, parts = measured(case), planned(case)
        share = sum(parts.values()) / peak
        sizes = {name: round(size / 2**30, 3) for name, size in parts.items()}
        row = {**asdict(case), "measured_gib": round(peak / 2**30, 3), "planned_gib": sizes, "share": round(share, 3)}
        append("plan", row, shlex.join(["python", *sys.argv]))
        name = f"{case.model} {case.image_size} px, {case.pairs} pairs, {case.optimizer}, {case.ranks} ranks"
        table.add_row(name, f"{peak / 2**30:.2f}", f"{sum(parts.values()) / 2**30:.2f}", f"{share:.2f}")
        if abs(share - 1) > MOST_OFF:
            off.append(name)
    console.print(table)
    if off:
        raise UserError(f"more than {MOST_OFF:.0%} off: {'; '.join(off)}")


def towers(case: Case) -> ModelConfig:
    model = model_config(case.model)
    image = replace(model.image, image_size=case.image_size)
    text = replace(model.text, vocab_size=VOCABULARY, eos_id=3, pad_id=0)
    return replace(model, image=image, text=text, init_logit_scale=10.0, init_logit_bias=-10.0)


def planned(case: Case) -> dict[str, float]:
    """Bytes by part."""
    train = TrainConfig(steps=1, global_batch_size=case.pairs * case.ranks)
    config = PlanConfig(model=towers(case), optimizer=OPTIMIZERS.get(case.optimizer)(), train=train)
    tokens = config.model.text.context_length
    return rank_memory(config, count_weights(config), case.ranks, case.pairs, tokens, bf16=False, fsdp=False)


def measured(case: Case) -> int:
    """Return the first rank's peak in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_measure, (case, folder), nprocs=case.ranks, start_method="spawn")
        return int((Path(folder) / "peak").read_text())


def _measure(rank: int, case: Case, folder: str) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed leaves
    torch.set_num_threads(1)
    if case.ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=case.ranks
        )
    full = towers(case)
    small = {"width": 64, "depth": 1, "mlp_dim": 64, "num_heads": 2}
    image = replace(full.image, **small, image_size=2 * full.image.patch_size)
    _steps(replace(full, embed_dim=64, image=image, text=replace(full.text, **small)), 16, case)
    libc.malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the record of the peak begins anew
    _steps(full, case.pairs, case)
    if rank == 0:
        (Path(folder) / "peak").write_text(str(_resident("VmHWM") - before))
    if case.ranks > 1:
        torch.distributed.destroy_process_group()


def _steps(config: ModelConfig, pairs: int, case: Case) -> None:
    from contrastive.losses import SigmoidLoss

    model, loss, image = DualEncoder(config), SigmoidLoss(), config.image
    wrapped = model
    if case.ranks > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizers = OPTIMIZERS.get(case.optimizer)().build(model)
    for _ in range(2):
        pixels = torch.randn(pairs, 3, image.image_size, image.image_size)
        tokens = torch.randint(5, 99, (pairs, config.text.context_length))
        features = wrapped(pixels, tokens)
        loss(*features).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            step_unless(torch.tensor(False), optimizer)
            optimizer.zero_grad()


def _resident(record: str) -> int:
    return 1024 * int(re.search(rf"{record}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    run_benchmark("plan.py", Options, __doc__.partition("\n")[0], main)
