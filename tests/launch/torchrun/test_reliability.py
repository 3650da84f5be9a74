"""A failure here means: a run does not survive what docs/reliability.md promises that it survives."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longnet_dist import TrainConfig
from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.training.job import local_run_files, lock_run_folder
from tests.launch.jobs import SHORT, forked, losses, run, start, train, until
from tests.launch.jobs import TWELVE_STEPS as OPTIONS

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def workers(agent: int) -> list[int]:
    """Return the process ids of the workers that an agent started, in order."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(pid) for pid in children)


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "signal_number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_finishes_the_step_and_the_next_start_resumes_bit_for_bit(tmp_path, undisturbed, ranks, signal_number):
    folder = tmp_path / "run"
    job = start(ranks, *train(folder, *OPTIONS))
    until(folder, 3, job)
    for pid in [job.pid] if ranks == 1 else workers(job.pid):
        os.kill(pid, signal_number)
    out, error = job.communicate(timeout=90)
    assert job.returncode == 0, error
    assert f"to resume: longnet-dist train --resume {folder}" in out
    stopped_at = len(losses(folder))
    assert 3 <= stopped_at < len(undisturbed)
    done = forked(ranks, *train(folder, *OPTIONS))
    assert done.returncode == 0, done.stderr
    assert f"of step {stopped_at} on {ranks} ranks" in done.stdout
    if ranks == 2:
        assert losses(folder) == undisturbed
    else:
        assert losses(folder) == pytest.approx(undisturbed, rel=1e-10)


@pytest.mark.slow
def test_resumes_on_other_numbers_of_ranks_and_axes(tmp_path, undisturbed):
    """A run on four ranks, resumed from its middle on one, two and eight in other arrangements, has the same curve."""
    folder = tmp_path / "run"
    assert forked(4, *train(folder, *OPTIONS, "--keep-checkpoints", 9, "--parallel.dp-shard", 2)).returncode == 0
    for ranks, axes in ((1, ()), (2, ("--parallel.dp-shard", 2)), (8, ("--parallel.dp-replicate", 2))):
        again = tmp_path / f"again-{ranks}"
        shutil.copytree(folder / "checkpoints" / "step-00000004", again / "checkpoints" / "step-00000004")
        shutil.copy(folder / "metrics.jsonl", again)
        done = forked(ranks, *train(again, *OPTIONS, *axes))
        assert done.returncode == 0, done.stderr
        assert "of step 4 on 4 ranks" in done.stdout
        assert losses(again) == pytest.approx(undisturbed, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ()),
        (2, ("--grad-accumulation", 2)),
        (2, ("--parallel.dp-shard", 2, "--async-checkpoints")),
        (4, ("--parallel.dp-replicate", 2)),
        (4, ("--parallel.dp-shard", 2, "--model.tie-embeddings")),
        (8, ("--parallel.dp-replicate", 2, "--parallel.dp-shard", 2, "--batch-size", 4)),
    ],
)
def test_resumes_bit_for_bit_from_a_step_that_also_validated(tmp_path, ranks, options):
    """In every arrangement, the checkpoint holds the moments of every parameter, although a validation came before."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    arguments = (*SHORT, "--steps", 6, "--keep-checkpoints", 9, *options)
    done = forked(ranks, *train(whole, *arguments))
    assert done.returncode == 0, done.stderr
    for step in (2, 4, 6):
        assert set(moment_steps(whole / "checkpoints" / f"step-{step:08d}").values()) == {float(step)}
    shutil.copytree(whole / "checkpoints" / "step-00000004", again / "checkpoints" / "step-00000004")
    shutil.copy(whole / "metrics.jsonl", again)
    done = forked(ranks, *train(again, *arguments))
    assert done.returncode == 0, done.stderr
    assert f"of step 4 on {ranks} ranks" in done.stdout
    assert losses(again) == losses(whole)


def moment_steps(path: Path) -> dict[str, float]:
    """Read AdamW's count of steps of every parameter from a checkpoint."""
    stored = TensorsOnlyReader(path).read_metadata().state_dict_metadata
    steps = {name: torch.zeros(()) for name in stored if name.startswith("optimizer.step.")}
    assert len(steps) == sum(name.startswith("model.") for name in stored)
    Checkpoints(path.parent).load(path, steps)
    return {name: x.item() for name, x in steps.items()}


@pytest.mark.parametrize(
    ("seed", "ranks"), [(0, 2), *(pytest.param(*case, marks=EXHAUSTIVE) for case in ((1, 2), (2, 4), (3, 4)))]
)
def test_sigkill_of_any_rank_at_any_time(tmp_path, undisturbed, seed, ranks):
    """While training, while restarting, and later: with --max-restarts, the losses are exactly the same."""
    folder, chance = tmp_path / "run", random.Random(seed)
    job = start(ranks, *train(folder, *OPTIONS), launcher=("--max-restarts=3",))
    step = chance.randint(2, 5)
    until(folder, step, job)
    killed = workers(job.pid)
    os.kill(chance.choice(killed), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(again := set(workers(job.pid)) - set(killed)) < ranks:
        assert time.monotonic() < deadline, "the workers were not restarted"
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 2))  # A start takes seconds; this is a moment in it.
    os.kill(chance.choice(sorted(again)), signal.SIGKILL)
    until(folder, chance.randint(step + 3, 9), job)
    os.kill(chance.choice(workers(job.pid)), signal.SIGKILL)
    out, error = job.communicate(timeout=150)
    assert job.returncode == 0, error
    assert "resuming from" in out
    # Other numbers of ranks add in another order.
    assert losses(folder) == (undisturbed if ranks == 2 else pytest.approx(undisturbed, rel=1e-10))


@pytest.mark.slow
def test_a_run_in_a_store_survives_sigkill_and_resumes_elsewhere(tmp_path, undisturbed, bucket):
    """Two ranks, one of them killed, over S3's protocol; then, from the middle, one rank with an empty cache."""
    folder, store = tmp_path / "run", f"{bucket}/runs/first"
    here = local_run_files(storage_path(store), TrainConfig(cache=tmp_path / "cache"), upload=False).folder
    arguments = train(folder, *OPTIONS, "--keep-checkpoints", 9, "--run-folder", store)
    job = start(2, *arguments, launcher=("--max-restarts=1",))
    until(here, 5, job)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    out, error = job.communicate(timeout=150)
    assert job.returncode == 0, error
    assert "resuming from s3://" in out
    assert losses(here) == losses(storage_path(store)) == undisturbed
    for step in (12, 10, 8):
        (storage_path(store) / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    shutil.rmtree(here)
    done = forked(1, *arguments)
    assert done.returncode == 0, done.stderr
    assert "of step 6 on 2 ranks" in done.stdout
    assert losses(storage_path(store)) == pytest.approx(undisturbed, rel=1e-10)
    assert not folder.exists()


@pytest.mark.slow
def test_an_agent_killed_alone_leaves_no_orphan(tmp_path):
    folder = tmp_path / "run"
    job = start(2, *train(folder, *OPTIONS, "--steps", 10_000))
    until(folder, 2, job)
    pids = workers(job.pid)
    job.kill()
    job.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while not all(map(has_ended, pids)):
        assert time.monotonic() < deadline, "a worker is still training"
        time.sleep(0.05)


def test_damaged_checkpoints_are_passed_over(tmp_path, undisturbed):
    """One has a flipped byte, one is truncated, one lacks a file, and one is unfinished."""
    folder = tmp_path / "run"
    assert forked(2, *train(folder, *OPTIONS, "--keep-checkpoints", 9)).returncode == 0
    flipped, truncated, without = (folder / "checkpoints" / f"step-{step:08d}" for step in (12, 10, 8))
    data = bytearray((flipped / "__1_0.distcp").read_bytes())
    data[-1] ^= 1
    (flipped / "__1_0.distcp").write_bytes(data)
    os.truncate(truncated / "__0_0.distcp", 1000)
    (without / "__0_0.distcp").unlink()
    shutil.copytree(truncated, folder / "checkpoints" / "step-00000014.tmp-0123abcd")
    done = forked(2, *train(folder, *OPTIONS, "--keep-checkpoints", 9))
    assert done.returncode == 0, done.stderr
    for message in (
        r"step-00000012 is damaged and passed over: rank \d: __1_0.distcp is not as it was written",
        r"step-00000010 is damaged and passed over: rank \d: __0_0.distcp is not .* \(1000 bytes now",
        r"step-00000008 is damaged and passed over: rank \d: __0_0.distcp is missing",
        r"resuming from .*step-00000006, of step 6",
    ):
        assert re.search(message, done.stdout), done.stdout
    assert losses(folder) == undisturbed
    assert not list((folder / "checkpoints").glob("*.tmp-*"))


def test_a_step_that_is_not_finite_is_skipped_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", "loss nan")
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    done = forked(2, Path(__file__).with_name("faults.py"), *train(tmp_path / "run", *OPTIONS)[2:])
    assert done.returncode == 0, done.stderr
    assert "step 5 is skipped: loss nan" in done.stderr
    curve = losses(tmp_path / "run")
    assert [step for step, loss in enumerate(curve, start=1) if loss is None] == [5]
    assert curve[11] < curve[0]


def test_a_state_that_is_not_finite_on_one_rank_replaces_no_checkpoint(tmp_path, monkeypatch):
    """Rank 1's moments hold NaN at step 6; later steps are skipped until the run stops."""
    monkeypatch.setenv("FAULTS", "state nan")
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    done = forked(2, Path(__file__).with_name("faults.py"), *train(tmp_path / "run", *OPTIONS, "--steps", 20)[2:])
    assert done.returncode != 0
    assert "no checkpoint of step 6: rank 1: optimizer.exp_avg.norm.weight holds NaN or infinity" in done.stderr
    assert "steps in a row were not finite" in done.stderr
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(tmp_path, monkeypatch):
    """Rank 1 sleeps; rank 0, which waits for it in C code, gets two signals."""
    monkeypatch.setenv("FAULTS", "forward sleep")
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    job = start(2, Path(__file__).with_name("faults.py"), *train(tmp_path / "run", *OPTIONS)[2:])
    until(tmp_path / "run", 4, job)
    (first, *_) = workers(job.pid)
    deadline = time.monotonic() + 30
    while not (tmp_path / "forward sleep").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first, signal.SIGTERM)
    time.sleep(3.2)  # A second signal sooner than this counts as the first, passed on by a launcher.
    os.kill(first, signal.SIGTERM)
    began = time.monotonic()
    while not has_ended(first):
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    job.communicate(timeout=60)
    assert job.returncode != 0


def test_a_second_job_in_the_same_folder_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("longnet_dist.training.job.LOCK_SECONDS", 0.2)
    with lock_run_folder(tmp_path), pytest.raises(ValueError, match="another job trains in"), lock_run_folder(tmp_path):
        pass
    with lock_run_folder(tmp_path):
        pass


@pytest.mark.slow
def test_ranks_with_different_options_fail(tmp_path):
    """Every rank raises an error that names the option, and none hangs."""
    script = tmp_path / "own.sh"
    options = " ".join(map(str, train(tmp_path / "run", *OPTIONS)))
    script.write_text(f"exec {sys.executable} {options} --learning-rate 0.00$((RANK + 1))\n")
    done = run(2, "/bin/sh", script, launcher=("--no-python",))
    assert done.returncode != 0
    assert "every rank must have the same options: learning_rate is 0.001 on rank 0, and 0.002 on rank 1" in done.stderr


@contextlib.contextmanager
def small_disk(run: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size as the checkpoints folder of a run."""
    small = run / "checkpoints"
    small.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        yield small
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_full_disk_warns_and_training_continues_to_its_end(tmp_path, undisturbed):
    """The disk holds one checkpoint, not two: the run ends with an error, because its last one is missing."""
    with small_disk(tmp_path / "run", "1m") as small:
        done = forked(2, *train(tmp_path / "run", *OPTIONS))
        assert done.returncode == 1, done.stderr
        assert "no checkpoint of step" in done.stderr
        assert "No space left" in done.stderr
        assert losses(tmp_path / "run") == undisturbed
        (kept,) = [p.name for p in small.iterdir() if ".tmp-" not in p.name]
        assert re.search(
            rf"longnet-dist: the run ended after step 12 without a checkpoint of it: .*the newest .* is .*{kept}\n",
            done.stderr,
        )


def test_a_signal_on_a_full_disk_promises_no_checkpoint(tmp_path):
    """The disk has no room for one: the exit code is 1, and no message mentions one to resume from."""
    folder = tmp_path / "run"
    with small_disk(folder, "16k"):
        job = start(1, *train(folder, *OPTIONS, "--steps", 10_000))
        until(folder, 3, job)
        job.send_signal(signal.SIGTERM)
        out, error = job.communicate(timeout=90)
    assert job.returncode == 1, error
    assert "with a checkpoint" not in out
    last = error.splitlines()[-1]
    assert last.startswith("longnet-dist: the run ended after step ")
    assert " without a checkpoint of it: " in last
    assert last.endswith("there is no checkpoint to resume from")
