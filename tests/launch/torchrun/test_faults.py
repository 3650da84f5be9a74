"""A failure here means: a fault of one rank costs a run more than a restart, or is blamed on another rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.jobs import TWELVE_STEPS as OPTIONS
from tests.launch.jobs import forked, losses, run, train

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("save", 1),
        *(
            pytest.param(*case, marks=EXHAUSTIVE)
            for case in (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("save", 0))
        ),
    ],
)
def test_faults_of_any_rank_anywhere(tmp_path, undisturbed, monkeypatch, where, rank):
    """One after the other: the job ends with exactly the same losses."""
    faults = [f"{where} {what}" for what in ("raise", "SIGKILL", "SIGSTOP", "SIGTERM")]
    script, folder = Path(__file__).with_name("faults.py"), tmp_path / "run"
    monkeypatch.setenv("FAULTS", ",".join(faults))
    monkeypatch.setenv("FAULT_RANK", str(rank))
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")  # How long torchrun waits for a rank that is stopped.
    limits = ("--timeout", 5, "--io-timeout", 8)
    done = run(2, script, *train(folder, *OPTIONS, *limits)[2:], launcher=("--max-restarts=4",))
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / fault).exists() for fault in faults)
    assert done.stdout.count("resuming from") == 3
    # SIGTERM is no fault: all ranks finish the step and exit normally, and the next start resumes.
    assert 5 <= len(losses(folder)) <= 7
    done = forked(2, *train(folder, *OPTIONS))
    assert "resuming from" in done.stdout
    assert losses(folder) == undisturbed


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path, monkeypatch):
    """Rank 1 sleeps in its fifth step; rank 0's error names it, and where it is."""
    monkeypatch.setenv("FAULTS", "forward sleep")
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    done = run(2, Path(__file__).with_name("faults.py"), *train(tmp_path / "run", *OPTIONS, "--timeout", 5)[2:])
    assert done.returncode != 0
    assert "step 5" in done.stderr
    assert "rank 1 is in no collective, so the others wait for it" in done.stderr
    assert "faults.py" in done.stderr
    assert "in oversleep" in (tmp_path / "run" / "traces" / "rank-1.txt").read_text()
