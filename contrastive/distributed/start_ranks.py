"""torchrun as it is, but that it ends in silence: python -m contrastive.distributed.start_ranks --nproc_per_node 2 ...

A rank that fails has said why, in a line that torchrun's report of forty would bury. The exit status is that of the
first rank to fail, 128 + N where signal N killed it or was sent to this process.
"""

import logging
import os
import signal
import sys

import psutil
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, parse_args, run

LOGGERS = ("multiprocessing.api", "multiprocessing.subprocess_handler.subprocess_handler", "agent.server.api")
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")  # each is passed on to the ranks, which save and end
SECONDS = 60  # that they have for it


def main(args: list[str]) -> int:
    """Run torchrun with the arguments of its command line; return the exit status."""
    # Where the processes of a group meet again after a restart, gloo hangs in a store that is shared with the launcher.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # that it gives each rank one thread
    for name in LOGGERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    ours = ["--signals_to_handle", ",".join(SIGNALS)]
    # torch 2.11 does not know the timeout, and meets at port 29500 where nothing else is said, though it be taken.
    if any("--shutdown_timeout" in action.option_strings for action in get_args_parser()._actions):
        ours += ["--shutdown_timeout", str(SECONDS)]
    if not any(arg.startswith(("--nnodes", "--rdzv", "--master", "--standalone")) for arg in args):
        ours.append("--standalone")
    try:
        run(parse_args([*ours, *args]))
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=_order)
        if first.exitcode >= 0:
            return first.exitcode
        print(f"rank {rank} was killed by {first.signal_name()}", file=sys.stderr)
        return 128 - first.exitcode
    except (SignalException, KeyboardInterrupt) as stop:
        for name in SIGNALS:  # a second one is for the ranks alone, should they be saving yet
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        psutil.wait_procs(psutil.Process().children(), SECONDS)
        return 128 + getattr(stop, "sigval", signal.SIGINT)
    return 0


def _order(failure: tuple[int, ProcessFailure]) -> tuple[int, bool, bool, int]:
    """What failed first, of a second: what was killed, what failed, maybe over that, what torchrun then told to end."""
    rank, of = failure
    return of.timestamp, of.exitcode == -signal.SIGTERM, of.exitcode >= 0, rank


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
