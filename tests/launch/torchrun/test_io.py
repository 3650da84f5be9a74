"""A failure here means: slow storage, a full disk or a closed pipe ends a run that could have continued."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longnet_dist.training.job import lock_run_folder
from tests.launch.jobs import ENVIRONMENT, ROOT, command, forked, losses, start, train
from tests.launch.jobs import TWELVE_STEPS as OPTIONS

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_second_job_fails_on_every_rank_with_any_limit_of_collectives(tmp_path):
    """Rank 0 waits for the lock for longer than a collective may take."""
    folder = tmp_path / "run"
    folder.mkdir()
    with lock_run_folder(folder):
        done = forked(2, *train(folder, *OPTIONS, "--timeout", 3, "--io-timeout", 9))
    assert done.returncode == 2
    assert done.stderr.count(f"another job trains in {folder}: give another, or end it") == 2
    assert f"another job holds {folder}: waiting up to 4 s for it to end" in done.stderr


def test_slow_io_of_one_rank_does_not_end_a_run(tmp_path, undisturbed, monkeypatch):
    """Each operation takes longer than a collective may, and the waiting rank prints what it waits for."""
    folder, script = tmp_path / "run", Path(__file__).with_name("slow.py")
    arguments = train(folder, *OPTIONS, "--timeout", 3)[2:]
    monkeypatch.setenv("SLOW_SECONDS", "4.5")
    monkeypatch.setenv("SLOW", "open,metrics,write,remove")
    done = forked(2, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == undisturbed
    for message in (
        "waiting for rank 0 to open metrics.jsonl and the other logs (2 s)",
        "waiting for rank 0 to write the metrics (",
        "waiting for rank 1 to write its files of checkpoint step-00000002 (2 s)",
        "waiting for rank 0 to remove old checkpoints (2 s)",
    ):
        assert message in done.stderr
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    monkeypatch.setenv("SLOW", "hash,read")
    done = forked(2, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert "of step 10 on 2 ranks" in done.stdout
    assert losses(folder) == undisturbed
    step = folder / "checkpoints" / "step-00000010"
    for action in ("verify", "read"):
        assert f"waiting for rank 1 to {action} {step} (2 s)" in done.stderr


def test_io_over_its_limit_is_an_error_that_names_the_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW_SECONDS", "8")
    monkeypatch.setenv("SLOW", "remove")
    script = Path(__file__).with_name("slow.py")
    done = forked(2, script, *train(tmp_path / "run", *OPTIONS, "--io-timeout", 3)[2:])
    assert done.returncode != 0
    assert re.search(
        r"checkpoint of step 2: rank 0 did not remove old checkpoints, after 3\.\d s \(io_timeout 3 s\)", done.stderr
    )


def test_a_full_disk_under_the_run_folder_costs_only_best_effort_output(tmp_path, undisturbed):
    """There is no room for options, metrics and traces; checkpoints are on another disk."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        (folder / "checkpoints").symlink_to(elsewhere)
        with pytest.raises(OSError, match="No space left"):
            (folder / "filler").write_bytes(bytes(1 << 17))
        done = forked(2, *train(folder, *OPTIONS, "--profile"))
        assert done.returncode == 0, done.stderr
        assert {p.name for p in elsewhere.iterdir()} == {"step-00000010", "step-00000012"}
        for output, ranks in (
            ("config.json and its options", 1),
            ("lines of metrics.jsonl", 1),
            ("metrics in TensorBoard", 1),
            ("traces of ranks that hang", 2),
            ("profiler traces", 2),
        ):
            pattern = rf"Warning: .*{output} may be missing or incomplete, and the run continues: .*No space left"
            assert len(re.findall(pattern, done.stderr)) == ranks, (output, done.stderr)
        (folder / "filler").unlink()
        shutil.rmtree(elsewhere / "step-00000012")
        assert forked(2, *train(folder, *OPTIONS)).returncode == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines] == undisturbed[10:]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_closed_stdout_does_not_end_the_run(tmp_path, undisturbed, monkeypatch):
    """That is what `| head -1` does. Text left in a buffer must not change the exit code, either."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    folder = tmp_path / "run"
    job = start(1, *train(folder, *OPTIONS))
    assert job.stdout is not None
    assert "reading" in job.stdout.readline()
    job.stdout.close()
    job.stdout = None
    _, error = job.communicate(timeout=90)
    assert job.returncode == 0, error
    assert error.count("lines printed to stdout may be missing or incomplete") == 1
    assert "Exception ignored" not in error
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-10)
    assert (folder / "checkpoints" / "step-00000012" / "manifest.json").exists()


def test_output_to_a_full_disk_does_not_end_the_run(tmp_path, undisturbed, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    folder = tmp_path / "run"
    shell = ["sh", "-c", 'exec "$@" > /dev/full 2> /dev/full', "sh", *command(1, *train(folder, *OPTIONS))]
    assert subprocess.run(shell, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=90).returncode == 0
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-10)
    assert (folder / "checkpoints" / "step-00000012" / "manifest.json").exists()
