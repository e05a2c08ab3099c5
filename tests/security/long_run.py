"""Change valid files in many ways and read them: python tests/security/long_run.py --inputs 100000

Prints counts by reader and outcome, and keeps each input that did harm in --keep, to be read again by its seed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

for variable, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("RAYON_NUM_THREADS", "1")):
    os.environ.setdefault(variable, value)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bombs import bomb  # noqa: E402
from sandbox import ALLOWED, attempts, input_of, put  # noqa: E402


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all readers")
    parser.add_argument("--seconds", type=float, help="of CPU time a reader at most")
    parser.add_argument("--reader", default="", help="only those with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each reader")
    parser.add_argument("--keep", type=Path, help="folder for inputs that did harm")
    parser.add_argument(
        "--json", type=Path, help="write every finding that is not allowed, and the counts, to this file"
    )
    parser.add_argument("--one", action="store_true", help="read the input --seed of --reader here, with a traceback")
    options = parser.parse_args(arguments)
    import corpus

    for kind in ("gzip", "zlib"):
        bomb(kind)  # once, not in each process
    readers = [reader for reader in corpus.readers() if options.reader in reader.name]
    with tempfile.TemporaryDirectory(prefix="hostile-") as work:
        for number, reader in enumerate(readers):
            corpus.check(reader, Path(work, f"valid-{number}"))
        if options.one:
            put(Path(work, "one"), input_of(readers[0], options.seed))
            print(readers[0].read(Path(work, "one")))
            return 0
        return _run(readers, options, Path(work))


def _run(readers, options, work: Path) -> int:
    each, counts, harm = -(-options.inputs // len(readers)), {}, []
    for reader in readers:
        begun, count = _cpu_seconds(), Counter()
        for found in attempts(reader, range(options.seed, options.seed + each), work / "box", options.seconds):
            count[found.outcome] += 1
            if found.outcome not in ALLOWED:
                harm.append(found)
                if options.keep:
                    put(options.keep / f"{found.reader} {found.seed}", input_of(reader, found.seed))
        counts[reader.name] = count
        seen = ", ".join(f"{times} {outcome}" for outcome, times in count.most_common())
        print(f"{reader.name}: {seen} ({_cpu_seconds() - begun:.1f} s)", flush=True)
    for found in harm:
        print(f"{found.reader} {found.seed}: {found.outcome}: {found.what}", flush=True)
    print(_table(counts))
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "harm": harm}))
    return 1 if harm else 0


def _cpu_seconds() -> float:
    times = os.times()
    return sum(times[:4])  # its own and those of its children


def _table(counts: dict[str, Counter]) -> str:
    outcomes = [*ALLOWED, *sorted({name for count in counts.values() for name in count} - {*ALLOWED})]
    total = sum(counts.values(), Counter())
    lines = [f"| reader | inputs | {' | '.join(outcomes)} |", "|---" + "|---:" * (len(outcomes) + 1) + "|"]
    for name, count in [*counts.items(), ("all", total)]:
        lines.append(f"| {name} | {count.total():,} | {' | '.join(f'{count[o]:,}' for o in outcomes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
