"""benchmarks/soak.py: what it says of memory that grows, and of memory that does not."""

import importlib
import random

import pytest
from launching import ROOT


@pytest.mark.parametrize("leak", [0, 100])
def test_a_leak_is_told_from_noise(leak, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    noise = random.Random(0)
    looks = []
    for second in range(0, 3600, 5):
        at_start = 300e6 * min(1, second / 600)  # what is allocated once
        megabytes = 200e6 + at_start + leak * 1e6 * second / 3600 + noise.gauss(0, 5e6)
        looks.append((float(second), int(megabytes), 80 + (leak > 0) * second // 60, 9, 3))
    found = importlib.import_module("soak").summary(looks)
    assert found["megabytes_per_hour"] == pytest.approx(leak, abs=4 * found["megabytes_per_hour_error"])
    assert found["megabytes_per_hour_error"] < 3
    assert found["megabytes_rise"] == pytest.approx(0.65 * leak, abs=6)
    first, last = found["open_files"]
    assert (last > first) == (leak > 0) and found["threads"] == [9, 9]
