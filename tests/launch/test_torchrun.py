"""A failure here means: what a user types does not work, or training over ranks is not training on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.launch, pytest.mark.timeout(200)]
ROOT = Path(__file__).parents[2]


def start(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module or script with real torchrun, or with python alone for one rank; threads as torchrun has them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def losses(folder: Path, ranks: int, text: Path, *options: object) -> list[float]:
    """The loss of every step of a tiny float64 run, and its validation."""
    run = folder / f"run-{ranks}"
    done = start(
        ranks, "-m", "longnet_dist", "train", "--data", text, "--run-folder", run, "--cache", folder / "cache",
        "--steps", 6, "--validation-sequences", 2, "--warmup-steps", 2, "--dtype", "float64", "--model.d-model", 16,
        "--model.num-layers", 2, "--model.num-heads", 2, "--model.segment-lengths", 64, 256,
        "--model.dilation-rates", 1, 4, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "byte-unigram model" in done.stdout
    measured = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in measured] + [measured[-1]["validation_bits_per_byte"]]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of a text that repeats itself, and counts\n" for n in range(1000)))
    return path


@pytest.mark.parametrize(("seq_len", "options"), [(256, ()), (250, ("--keep-kv", "--grad-accumulation", 2))])
def test_two_and_four_ranks_train_as_one(tmp_path, text, seq_len, options):
    """Same seed, same data: the curve of one process within rounding, even or uneven."""
    alone = losses(tmp_path, 1, text, "--seq-len", seq_len, *options)
    assert alone[5] < alone[0]
    for ranks in (2, 4):
        assert losses(tmp_path, ranks, text, "--seq-len", seq_len, *options) == pytest.approx(alone, rel=1e-10)


def test_bad_data_is_said_and_fails(tmp_path):
    done = start(2, "-m", "longnet_dist", "train", "--data", "nothing-there/", "--run-folder", tmp_path)
    assert done.returncode != 0
    assert "longnet-dist: --data nothing-there/: no file there" in done.stderr


def test_the_example_gives_the_same_numbers_on_any_number_of_ranks():
    said = {start(ranks, "examples/attention.py").stdout.split(":")[1] for ranks in (1, 2, 4)}
    assert len(said) == 1
    assert "dq" in said.pop()
