"""Real jobs for tests: torchrun, or python alone, of a tiny float64 model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TINY = (
    "--dtype", "float64", "--warmup-steps", 2, "--validation-sequences", 2, "--validate-every", 0,
    "--model.d-model", 16, "--model.num-layers", 2, "--model.num-heads", 2,
    "--model.segment-lengths", 64, 256, "--model.dilation-rates", 1, 4,
)  # fmt: skip


def command(ranks: int, *arguments: object, launcher: tuple[object, ...] = ()) -> list[str]:
    """python, or torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    return [sys.executable, *map(str, torchrun if ranks > 1 or launcher else []), *map(str, arguments)]


def start(ranks: int, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a job in a session of its own."""
    return subprocess.Popen(
        command(ranks, *arguments, **options),  # type: ignore[arg-type]
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(ranks: int, *arguments: object, limit: float = 150, **options: object) -> subprocess.CompletedProcess[str]:
    """A job to its end."""
    job = start(ranks, *arguments, **options)
    try:
        out, error = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, 9)
        raise AssertionError(f"no end in {limit} s: {job.communicate()}") from None
    return subprocess.CompletedProcess(job.args, job.returncode, out, error)


def train(folder: Path, *options: object) -> list[object]:
    """The arguments of a tiny training run in `folder`, which holds text.txt."""
    text, cache = folder.parent / "text.txt", folder.parent / "cache"
    if not text.exists():
        text.write_text("".join(f"line {n} of a text that repeats itself, and counts\n" for n in range(1000)))
    return ["-m", "longnet_dist", "train", "--data", text, "--cache", cache, "--run-folder", folder, *TINY, *options]


def losses(folder: Path) -> list[float]:
    """Of every step that the run's metrics hold, in order, each once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
