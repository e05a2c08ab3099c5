"""What runs in the processes that benchmarks/loss.py starts, one a rank: time, peak memory and error of each rival."""

import ctypes
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_rivals import DTYPES, Case, build

from contrastive.distributed.collectives import all_gather_rows, all_reduce_sum, gather_objects
from contrastive.losses import reference

ORACLE_BATCH = 4096  # the oracle keeps about ten B² float64 tensors: 1.3 GB
MATMUL_BATCH = 8192
SAMPLE_SECONDS = 0.1  # a sample repeats a quicker call until about this long
M_MMAP_THRESHOLD = -3  # malloc.h
NAMES = ("image_grad", "text_grad", "scale_grad", "bias_grad")
Leaves = list[torch.Tensor]


def measure(rank: int, case: Case, rivals: list[str], parts: tuple[str, ...], repeats: int, folder: str) -> None:
    """Measure `parts` (memory, time, errors) of `rivals` in turn; rank 0 writes folder/found.json by rival."""
    _settle(case, rank, alone=parts == ("memory",))
    found = {name: {} for name in rivals}
    whole = _one_process(case, rivals, found) if "errors" in parts and rank == 0 else {}
    if case.ranks > 1:
        backend = "nccl" if case.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=case.ranks)
    leaves = _leaves(case, rank, case.ranks)
    losses = {name: build(name, case, rank, case.ranks) for name in rivals}
    if "memory" in parts:
        for name in _unfailed(found):
            with _failure_noted(found[name], case):
                found[name]["peak_bytes_per_rank"] = gather_objects(_peak_memory(losses[name], leaves, case, name))
    if "time" in parts:
        _time(losses, leaves, case, repeats, found)
    if "errors" in parts:
        for name in _unfailed(found):
            with _failure_noted(found[name], case):
                result = _over_ranks(_gradients(losses[name], leaves))
                found[name].update(_errors(result, whole, name) if rank == 0 else {})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if case.ranks > 1:
        dist.destroy_process_group()


def _settle(case: Case, rank: int, alone: bool) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecated calls in peers' code
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    with suppress(OSError):  # when memory runs out, the kernel is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    if alone and case.device == "cpu":
        # glibc raises this threshold as it goes, and then keeps freed tensors for later: resident but not needed.
        # At its initial value every freed tensor leaves the process, as it leaves a GPU's count.
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


@contextmanager
def _failure_noted(found: dict, case: Case):
    """Keep an exception as the rival's error. Not with several ranks: the others would wait for this one."""
    try:
        yield
    except Exception as error:
        if case.ranks > 1:
            raise
        found["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if "error" in found:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()


def _unfailed(found: dict) -> list[str]:
    return [name for name in found if "error" not in found[name]]


def _leaves(case: Case, rank: int, ranks: int) -> Leaves:
    """Return image and text features, unit rows, then logit_scale and, for sigmoid, logit_bias.

    The cosine of a matching pair is about 0.7, which gives both losses the size they have in training.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    rows = slice(rank * case.batch // ranks, (rank + 1) * case.batch // ranks)
    shape = (case.batch, case.dim)
    image = F.normalize(torch.randn(shape, generator=generator, device=case.device))
    text = torch.randn(shape, generator=generator, device=case.device).div_(math.sqrt(case.dim)).add_(image)
    features = [f[rows].to(DTYPES[case.dtype], copy=True) for f in (image, F.normalize(text))]
    scalars = (10.0, -10.0) if case.loss == "sigmoid" else (1 / 0.07,)
    return [leaf.requires_grad_() for leaf in (*features, *(torch.tensor(s, device=case.device) for s in scalars))]


def _step(loss: Callable, leaves: Leaves) -> torch.Tensor:
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves[:3], leaves[3] if len(leaves) > 3 else None)
    value.backward()
    return value.detach()


def _gradients(loss: Callable, leaves: Leaves) -> dict[str, torch.Tensor]:
    value = _step(loss, leaves)
    return {"loss": value, **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=False)}}


def _over_ranks(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return loss and gradients of the whole batch, as DistributedDataParallel's mean over ranks would have them."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    together = {name: all_gather_rows if t.ndim else all_reduce_sum for name, t in result.items()}
    return {name: together[name](t.contiguous()) / world_size for name, t in result.items()}


def _one_process(case: Case, rivals: list[str], found: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Return loss and gradients of the whole batch in this process: `oracle`, and with ranks of each rival."""
    torch.set_num_threads(case.threads * case.ranks)  # the other ranks wait
    results = {}
    leaves = _leaves(case, 0, 1)
    if case.batch <= ORACLE_BATCH:
        results["oracle"] = _gradients(_oracle(case), [leaf.detach().double().requires_grad_() for leaf in leaves])
    for name in rivals if case.ranks > 1 else ():
        results[name] = _gradients(build(name, case, 0, 1), leaves)
    torch.set_num_threads(case.threads)
    return results


def _oracle(case: Case) -> Callable:
    pairs = reference.pair_labels(torch.arange(case.batch, device=case.device), "negative")
    if case.loss == "sigmoid":
        return lambda image, text, scale, bias: reference.sigmoid_loss(image, text, scale, bias, *pairs)
    return lambda image, text, scale, _: reference.softmax_loss(image, text, scale, *pairs)


def _errors(result: dict, whole: dict, name: str) -> dict:
    def against(expected: dict | None) -> dict | None:
        return expected and {key: _relative(result[key], expected[key]) for key in expected}

    ranks = against(whole.get(name))
    return {"errors": against(whole.get("oracle")), **({"ranks_error": max(ranks.values())} if ranks else {})}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _peak_memory(loss: Callable, leaves: Leaves, case: Case, name: str) -> int | None:
    """Return the bytes of this rank that a step needs beyond features and their gradients; see loss.py for how."""
    tiny = [leaf[:16].detach().requires_grad_() if leaf.ndim else leaf for leaf in leaves]
    _step(loss, leaves if name == "open_clip_compiled" or case.device == "cuda" else tiny)
    for leaf in leaves:
        leaf.grad = None
    gradients = sum(leaf.nbytes for leaf in leaves[:2])
    if dist.is_initialized():
        dist.barrier()
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(loss, leaves)
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before - gradients, 0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak resident set starts anew from the present one
        before = _status_bytes("VmRSS")
        _step(loss, leaves)
        return max(_status_bytes("VmHWM") - before - gradients, 0)
    except OSError:  # not Linux, or a container that does not allow it
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _time(losses: dict[str, Callable], leaves: Leaves, case: Case, repeats: int, found: dict) -> None:
    """Time every rival and the bare matrix products once a round, so that the machine's drift hits all alike."""
    matmul, matmul_flops = _matmul(case)
    calls = {"matmul": matmul, **{name: lambda loss=loss: _step(loss, leaves) for name, loss in losses.items()}}
    notes = {"matmul": {}, **found}
    inner, samples = {}, {name: [] for name in calls}
    for name in _unfailed(notes):
        with _failure_noted(notes[name], case):
            calls[name]()  # compiles, chooses kernels
            inner[name] = max(1, min(100, int(SAMPLE_SECONDS / _sample(calls[name], 1, case))))
    for _ in range(repeats):
        for name in _unfailed(notes):
            with _failure_noted(notes[name], case):
                samples[name].append(_sample(calls[name], inner[name], case))
    for name in _unfailed(notes):
        if name == "matmul":
            continue
        found[name]["seconds"] = samples[name]
        found[name]["matmul_flops"] = matmul_flops / statistics.median(samples["matmul"])


def _sample(call: Callable, inner: int, case: Case) -> float:
    """Return the seconds of one call, those of the slowest rank."""
    sync = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    if dist.is_initialized():
        dist.barrier()
    sync()
    started = time.perf_counter()
    for _ in range(inner):
        call()
    sync()
    return max(gather_objects((time.perf_counter() - started) / inner))


def _matmul(case: Case) -> tuple[Callable, int]:
    """Return a call of the three products of a step in plain torch.mm, and the FLOPs of all ranks in it."""
    columns = min(case.batch, MATMUL_BATCH)
    rows = columns // case.ranks
    options = {"dtype": DTYPES[case.dtype], "device": case.device}
    x, y, g = (torch.randn(shape, **options) for shape in ((rows, case.dim), (columns, case.dim), (rows, columns)))
    logits, x_grad, y_grad = torch.empty_like(g), torch.empty_like(x), torch.empty_like(y)

    def products() -> None:
        torch.mm(x, y.T, out=logits)
        torch.mm(g, y, out=x_grad)
        torch.mm(g.T, x, out=y_grad)

    return products, 3 * 2 * rows * columns * case.dim * case.ranks
