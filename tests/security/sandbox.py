"""Run a reader on changed files in a process of its own, and say what came of each: see `Found`.

The process may take LIMIT_SECONDS of CPU time an input and MEGABYTES more memory than before it, makes no file outside
of its folder, starts nothing, connects to nothing and unpickles nothing; the system kills it or an audit hook sees it.
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mutations import Files, mutated

from contrastive.data.record import BadSample
from contrastive.errors import UserError, one_line

LIMIT_SECONDS, MEGABYTES = 2.0, 300
ADDRESS_SPACE = 3 * 2**30  # beyond what the process has: what asks for more than this fails, as on a full machine
STUCK_SECONDS = 60  # of wall time: it waits for something
ALLOWED = ("read", "bad sample", "refused")
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)


class Reader(NamedTuple):
    """What reads files from outside. files: valid ones. read: of a folder that holds them; returns the bad samples."""

    name: str
    files: Files
    read: Callable[[Path], int | None]
    seal: Callable[[Files], Files] = lambda files: files  # what an attacker mends too, as sums of files


class Found(NamedTuple):
    """seed: of the input. outcome: one of ALLOWED, else what went wrong, told in `what`. seconds: of CPU time."""

    reader: str
    seed: int
    outcome: str
    what: str = ""
    seconds: float = 0.0


def input_of(reader: Reader, seed: int) -> Files:
    """Return the changed files; the same for the same seed."""
    rng = random.Random(f"{reader.name} {seed}")
    files = mutated(reader.files, rng)
    return reader.seal(files) if rng.random() < 0.8 else files


def put(folder: Path, files: Files) -> None:
    """Write the files; one that is in the way of another, or has a name that the system does not take, is left out."""
    for name, data in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except (OSError, ValueError):
            continue


def attempts(reader: Reader, seeds: range, root: Path, seconds: float | None = None) -> Iterator[Found]:
    """Yield what comes of the inputs of these seeds, for at most `seconds` of CPU time in all."""
    first, left = seeds.start, seconds
    while first < seeds.stop and (left is None or left > 0):
        ended = True
        for found in _of_one_process(reader, range(first, seeds.stop), root, left):
            if found is None:
                return
            first, ended = found.seed + 1, False
            if left is not None:
                left -= found.seconds
            yield found
        if ended:
            raise RuntimeError(f"{reader.name}: no input was tried")


def _of_one_process(reader: Reader, seeds: range, root: Path, seconds: float | None) -> Iterator[Found | None]:
    """As `attempts`, until the process ends; None when all is done."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(out)
            status = _child(reader, seeds, root, seconds, os.fdopen(into, "w", buffering=1))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(into)
    seed, done = seeds.start, False
    with os.fdopen(out) as lines:
        while True:
            if not select.select([lines], [], [], STUCK_SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                yield Found(reader.name, seed, "hang", f"nothing within {STUCK_SECONDS} s", LIMIT_SECONDS)
                return
            line = lines.readline()
            if not line:
                break
            found = Found(*json.loads(line))
            done = found.outcome == "done"
            if not done:
                seed = found.seed + 1
                yield found
    _, status = os.waitpid(pid, 0)
    if done:
        yield None
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        outcome = "hang" if number == signal.SIGPROF else "crash"
        yield Found(reader.name, seed, outcome, signal.Signals(number).name, LIMIT_SECONDS)
    elif os.WEXITSTATUS(status) not in (0,):
        raise RuntimeError(f"{reader.name}, input {seed}: the process of the test failed")


def _child(reader: Reader, seeds: range, root: Path, seconds: float | None, out) -> int:
    spent, watch = 0.0, _Watch(root)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # readers that start a process a core start none
    watch.begin()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for seed in seeds:
        begun = time.process_time()
        files = input_of(reader, seed)
        put(watch.fresh(), files)
        # The system's own clock of this process: what C code does counts too, what others do does not.
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS + (10 if seed == seeds.start else 0))
        outcome, what = _outcome(reader, watch.folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if broken := watch.broken():
            outcome, what = broken
        taken = time.process_time() - begun
        out.write(json.dumps(Found(reader.name, seed, outcome, what[:500], taken)) + "\n")
        if outcome == "memory":
            return 0  # which the next input would start with
        spent += taken
        if seconds is not None and spent > seconds:
            break
    out.write(json.dumps(Found(reader.name, 0, "done")) + "\n")
    return 0


def _outcome(reader: Reader, folder: Path) -> tuple[str, str]:
    try:
        return ("bad sample" if reader.read(folder) else "read"), ""
    except UserError as error:
        said = str(error)
        if said != one_line(said) or len(said.splitlines()) != 1:
            return "no clear line", repr(said)
        return "refused", said
    except BadSample:
        return "bad sample", ""
    except BaseException as error:  # a panic of Rust is no Exception
        at = [frame for frame in traceback.extract_tb(error.__traceback__) if "/contrastive/" in frame.filename]
        where = f" at {Path(at[-1].filename).name}:{at[-1].lineno}" if at else ""
        return type(error).__name__, f"{str(error)[:300]}{where}"


class _Watch:
    """What a process does besides reading. root: holds the folder of the input; what is beside it stays as it is."""

    def __init__(self, root: Path):
        self.root, self.folder, self._cwd = root, root / "input", root / "here"
        self._done: list[str] = []
        self._before = 0.0

    def begin(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self._cwd.mkdir(parents=True)
        os.chdir(self._cwd)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.environ["CONTRASTIVE_CACHE"] = str(self.root / "cache")
        os.fsync = lambda descriptor: None
        sys.addaudithook(self._hear)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = _megabytes("VmRSS")
        self._done.clear()
        return self.folder

    def broken(self) -> tuple[str, str] | None:
        if self._done:
            return "broke out", self._done[0]
        beside = {path.name for path in self.root.iterdir()} - {"input", "here", "cache"}
        if beside or any(self._cwd.iterdir()):
            return "broke out", f"made {sorted(beside) or os.listdir(self._cwd)}"
        grown = _megabytes("VmHWM") - self._before
        return ("memory", f"{grown:.0f} MB") if grown > MEGABYTES else None

    def _hear(self, event: str, arguments: tuple) -> None:
        if event in _FORBIDDEN:
            self._done.append(f"{event} {arguments}"[:300])
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2]
            if flags & (os.O_WRONLY | os.O_RDWR) and not path.startswith((str(self.root), "/dev/", "/proc/")):
                self._done.append(f"wrote {path}")


def _megabytes(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{name}:"))
