"""Ranks for tests, forked from a process that has imported torch once: a start then takes no seconds."""

import os
import runpy
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

IMPORTED = [
    *(
        "contrastive.commands.pretrain_command",
        "contrastive.train.pretrain",
        "contrastive.train.first_look",
        "contrastive.interop.loading",
    ),
    *("contrastive.evaluate.classification", "contrastive.evaluate.retrieval", "contrastive.evaluate.report"),
    *("contrastive.data.sources.arrays", "PIL.PngImagePlugin", "jinja2", "matplotlib.ticker", "tyro"),
    *("hypothesis", "pytest", "torch._dynamo"),
]  # what a run imports late too


def run_on_ranks(number, function, *args, seconds=120):
    """Call function(rank, *args) in `number` processes that share nothing with this one; wait, and raise their errors.

    Unlike forks of this process they have no threads, locks or process groups of the tests that ran before.
    """
    ranks = start_ranks(number, function, *args)
    limit = time.monotonic() + seconds
    while not ranks.join(timeout=1):
        if time.monotonic() > limit:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"the ranks did not end within {seconds} seconds")


def start_ranks(number, function, *args):
    """As `run_on_ranks`, but without waiting: return the processes' context."""
    mp.get_context("forkserver").set_forkserver_preload(IMPORTED)
    return mp.start_processes(function, args, nprocs=number, join=False, start_method="forkserver")


def joined(rank, number, port):
    """In one of `run_on_ranks`: join the others on the CPU; return the runtime."""
    from contrastive.distributed.runtime import Runtime

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, ACCELERATE_USE_CPU="true")
    return Runtime("fp32")


def script_on_ranks(number, port, script, *args, folder, **variables):
    """Run a script on CPU ranks, as torchrun does but for ending the others when one fails.

    Returns:
        The exit status of each, and what all of them wrote to stderr.
    """
    folder.mkdir(exist_ok=True)
    run_on_ranks(number, _run_script, number, port, str(script), [str(arg) for arg in args], str(folder), variables)
    written = [(folder / f"stderr{rank}").read_text() for rank in range(number)]
    return [int((folder / f"status{rank}").read_text()) for rank in range(number)], "".join(written)


def script_on_mortal_ranks(number, port, script, *args, folder, seconds=60, **variables):
    """As `script_on_ranks`, where a rank may be killed, whose status is then the signal's number, negative.

    A rank that has not ended by itself after so many seconds is a TimeoutError.
    """
    ranks = start_script(number, port, script, *args, folder=folder, **variables)
    limit = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0, limit - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        ranks[rank].kill()
    if late:
        raise TimeoutError(f"ranks {late} did not end within {seconds} seconds")
    left = [folder / f"status{rank}" for rank in range(number)]
    statuses = [int(file.read_text()) if file.exists() else p.exitcode for file, p in zip(left, ranks, strict=True)]
    return statuses, "".join((folder / f"stderr{rank}").read_text() for rank in range(number))


def start_script(number, port, script, *args, folder, **variables):
    """As `script_on_ranks`, but without waiting: return the processes, which write to stderr0, ... in `folder`."""
    folder.mkdir()
    words = [str(arg) for arg in args]
    return start_ranks(number, _run_script, number, port, str(script), words, str(folder), variables).processes


def _run_script(rank, number, port, script, args, folder, variables):
    torch.set_num_threads(1)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    os.environ.update({name: str(value) for name, value in {**meeting, **places, **variables}.items()})
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    with open(f"{folder}/stderr{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    Path(f"{folder}/status{rank}").write_text(str(status))
    sys.stdout.flush()
    os._exit(0)  # torch is not taken apart: gloo's threads abort now and then where another rank was quicker
