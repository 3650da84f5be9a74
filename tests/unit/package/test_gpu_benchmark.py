"""A failure here means: measuring a GPU fails once its machine is paid for, or an interruption loses the results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from longnet_dist.attention.kernels import KERNELS

ROOT = Path(__file__).parents[3]


def rehearse(out: Path, *options: str) -> tuple[int, list[dict]]:
    """Run the benchmark with small sizes on the CPU; return its exit status, and its rows."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", out, "--device", "cpu", "--small", *options]
    status = subprocess.run([*map(str, command), "--rounds", "1"], timeout=200, capture_output=True).returncode
    return status, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_part_of_the_gpu_benchmark_writes_results(tmp_path):
    status, rows = rehearse(tmp_path)
    outcomes = {row["part"]: row["outcome"] for row in rows if "outcome" in row}
    assert outcomes == dict.fromkeys(
        ("machine", "oracle", "floor", "peers", "gpus", "ranks", "training", "launches"), "done"
    ), rows
    assert status == 0
    assert not [row for row in rows if any("failed" in key for key in row)]
    tables = (tmp_path / "results.md").read_text()
    assert {"part": "gpus", "not run": "no GPU, and several ranks need one each"} in rows
    for part in outcomes.keys() - {"gpus"}:
        assert len([row for row in rows if row["part"] == part and not {"outcome", "not run"} & row.keys()]) >= 2, part
        assert f"## {part}\n\n|" in tables
    served = {row["value"] for row in rows if row.get("fact") == "kernels"}.pop().split(", ")
    refused = {row["kernel"]: row["not run"] for row in rows if row["part"] == "floor" and "not run" in row}
    assert {*served, *refused} == {*KERNELS}
    assert all(refused.values())
    assert {row["kernel"] for row in rows if row["part"] == "floor" and "x_floor" in row} == {*served}
    assert all(row["at_most_2"] for row in rows if row["part"] == "oracle" and "at_most_2" in row)
    # Gradients of the baseline lack the part through the mixing, and its output is that of ours.
    baseline = next(row for row in rows if row.get("pass") == "relative difference from ours")
    assert float(baseline["out"]) < 1e-5 < 1e-3 < float(baseline["dq"])


def test_an_interrupted_gpu_benchmark_keeps_what_it_measured(tmp_path):
    status, rows = rehearse(
        tmp_path, "--parts", "machine", "floor", "launches", "--limit", "floor=0", "--kernels", "torch", "absent"
    )
    assert status == 1
    outcomes = [(row["part"], row["outcome"]) for row in rows if "outcome" in row]
    assert outcomes == [("machine", "done"), ("floor", "ended at its limit of 0 s"), ("launches", "done")]
    assert {"part": "launches", "kernel": "absent", "not run": "there is no such kernel"} in rows
    tables = (tmp_path / "results.md").read_text()
    assert "| fact | value |" in tables
    assert "- outcome: ended at its limit of 0 s" in tables
