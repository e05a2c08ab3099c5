"""The real command of the data benchmark at a tiny size."""

import json
import subprocess
import sys

import pytest
from launching import ROOT, environment


def run(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), "--results", str(tmp_path / "rows"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)


@pytest.mark.slow
def test_data_measures_each_rival_on_the_same_shards(tmp_path):
    flags = "--sets real 320x240 --images 16 --batch 4 --workers 0 1 --rounds 2 --seconds 0.05 --seeks 50"
    done = run(tmp_path, *flags.split(), "--real", str(tmp_path / "none" / "{0..1}.tar"))
    assert done.returncode == 0, done.stderr
    assert "real is left out: there is no" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["set"] for row in rows} == {"320x240"} and not [row for row in rows if "error" in row]

    differences = rows[0]
    assert 0 < differences["bytes_per_image"] < 320 * 240
    assert differences["decode_difference"] < 0.5 and differences["resized_difference"] < 0.5
    assert 0 < differences["trained_difference"] < 1
    reads = [row for row in rows if row["what"] == "random reads by index"]
    assert [row["rival"] for row in reads] == ["ours", "datasets"] and all(row["seconds"] > 0 for row in reads)

    rates = [row for row in rows if "images_per_second" in row]
    assert [(row["workers"], row["rival"]) for row in rates] == [
        (workers, rival) for workers in (0, 1) for rival in ("ours", "open_clip", "webdataset", "datasets")
    ]
    for row in rates:
        assert 0 < row["images_per_second"] <= row["images_per_second_best"]
        assert 0 < row["ms_per_image_min"] <= row["ms_per_image_median"]
        assert row["rival"] in done.stdout and row["rounds"] == 2
    assert rates[1]["rival_version"].startswith("open_clip_torch ")


def test_data_refuses_what_it_cannot_measure(tmp_path):
    done = run(tmp_path, "--sets", "500by375")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("data.py: error: --sets 500by375: expected real, WIDTHxHEIGHT")
    assert not (tmp_path / "rows.jsonl").exists()
