"""Samples that could not be used: counted by reason over all ranks, and too many of them stop the run."""

from collections import Counter, deque
from collections.abc import Iterable

from contrastive.distributed.collectives import gather_objects
from contrastive.errors import UserError

MAX_KEYS = 20  # of each reason: enough to find what is wrong with the data


class BadSamples:
    """What a run's loaders passed over and replaced.

    Args:
        max_share: how many of the last `window` samples of all ranks may be bad, as a share.
    """

    def __init__(self, max_share: float, window: int):
        self.max_share, self.window = max_share, window
        self._counts: Counter[str] = Counter()  # of this rank, since they were last taken
        self._keys: dict[str, list[str]] = {}
        self._steps: deque[tuple[int, int]] = deque()  # samples and bad ones of all ranks, step by step
        self._samples = self._bad = 0

    def note(self, faults: Iterable[tuple[str, str]]) -> None:
        """Count (reason, key) of this rank's batch."""
        for reason, key in faults:
            self._counts[reason] += 1
            keys = self._keys.setdefault(reason, [])
            if len(keys) < MAX_KEYS:
                keys.append(key)

    def too_many(self, samples: int, bad: int) -> bool:
        """Add a step's samples and bad ones, of all ranks; return whether more than the allowed share is bad.

        At the start, when fewer than `window` have been seen, the number allowed is that of a whole window, so
        that one bad sample among the first hundred stops nothing.
        """
        self._steps.append((samples, bad))
        self._samples, self._bad = self._samples + samples, self._bad + bad
        while self._samples - self._steps[0][0] >= self.window:
            old_samples, old_bad = self._steps.popleft()
            self._samples, self._bad = self._samples - old_samples, self._bad - old_bad
        return self._bad > self.max_share * max(self.window, self._samples)

    def take(self) -> dict:
        """Return {'counts': by reason, 'keys': the first of each} of all ranks since the last call; all must call.

        Counted from there anew, so that a resumed run counts nothing twice.
        """
        ranks = gather_objects((self._counts, self._keys))
        self._counts, self._keys = Counter(), {}
        total = sum((counts for counts, _ in ranks), Counter())
        keys = {reason: [key for _, keys in ranks for key in keys.get(reason, [])][:MAX_KEYS] for reason in total}
        return {"counts": dict(total), "keys": keys}

    def error(self, step: int, taken: dict) -> UserError:
        """Return what to stop with."""
        reasons = sorted(taken["counts"].items(), key=lambda item: -item[1])
        listed = "; ".join(
            f"{count} {reason} ({', '.join(taken['keys'][reason][:3])}, ...)" for reason, count in reasons
        )
        of = max(self.window, self._samples)
        return UserError(
            f"stopped at step {step}: {self._bad} of the last {self._samples} samples could not be used, more than "
            f"{self.max_share:.2%} of {of}: {listed}. Repair the data (metrics.jsonl names more of them), "
            "or allow more with --data.max_bad_share"
        )


def merged(rows: Iterable[dict]) -> dict:
    """Return counts and keys of all 'bad_samples' rows of metrics.jsonl together, as `BadSamples.take` has them."""
    counts: Counter[str] = Counter()
    keys: dict[str, list[str]] = {}
    for row in rows:
        # Rows of runs begun before keys were kept hold the counts by themselves.
        counts.update(row.get("counts") or {name: n for name, n in row.items() if name not in ("kind", "step")})
        for reason, names in row.get("keys", {}).items():
            keys[reason] = (keys.get(reason, []) + names)[:MAX_KEYS]
    return {"counts": dict(counts), "keys": keys}
