"""A failure here means: the error of a run that hangs blames the wrong rank, or none."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longnet_dist.distributed.waits import mark_wait
from longnet_dist.training.stopping import Watch, stop_on_signals

TORCH_DISTRIBUTED = Path(dist.__file__).parent


def waiting_code(path: Path):
    """A function that calls another one until it returns true, compiled as if it stood in the file `path`."""
    names: dict[str, Any] = {}
    exec(compile("def stand_still(done):\n    while not done():\n        pass\n", str(path), "exec"), names)
    return names["stand_still"]


def explanation(folder: Path, stand_still, marker: str = "") -> str:
    """The error of a step in which this process, rank 0 of one, stands still until trace and marker are written."""
    trace, deadline = folder / "rank-0.txt", time.monotonic() + 30

    def done() -> bool:
        text = trace.read_text()
        return ("in explanation" in text and marker in text) or time.monotonic() > deadline

    def fail() -> None:
        with Watch(folder, rank=0, num_ranks=1, limit=0.5).over("step 3"):
            stand_still(done)
            raise RuntimeError("a collective failed")

    with pytest.raises(RuntimeError, match="step 3: a collective failed") as failure:
        fail()
    return str(failure.value)


@pytest.mark.parametrize(
    "path",
    [
        Path("/home/me/distributed/comm.py"),
        Path("/venv") / TORCH_DISTRIBUTED.relative_to("/") / "mine.py",
        TORCH_DISTRIBUTED.with_name("distributed_data") / "loader.py",
    ],
)
def test_a_path_that_looks_like_a_collective_does_not_hide_a_rank_that_hangs(tmp_path, path):
    """Not even if it contains the path of torch.distributed."""
    error = explanation(tmp_path, waiting_code(path))
    assert "rank 0 is in no collective, so the others wait for it: File" in error
    assert str(tmp_path) in error


def test_a_rank_in_a_collective_of_torch_is_not_blamed(tmp_path):
    """FSDP and DTensor set no marker, but their code is in torch's folder."""
    error = explanation(tmp_path, waiting_code(TORCH_DISTRIBUTED / "fsdp" / "any.py"))
    assert "in no collective" not in error
    assert f"what every rank was doing is in {tmp_path}" in error


def test_a_rank_with_a_marker_is_not_blamed_and_says_what_it_waits_for(tmp_path):
    """The outermost marker stands."""

    def wait(done):
        with mark_wait("to remove old checkpoints"):
            with mark_wait("while gathering"):
                pass
            waiting_code(Path("/home/me/any.py"))(done)

    error = explanation(tmp_path, wait, "remove old checkpoints")
    assert "in no collective" not in error
    assert "rank 0 waits for other ranks to remove old checkpoints\n" in error


def test_the_stacks_of_a_process_that_goes_on_are_written_under_the_interpreters_lock(tmp_path):
    """Without it, they are read while other threads free them, which ends a process that is only slow."""
    explanation(tmp_path, waiting_code(Path("/home/me/any.py")))
    assert "Current thread" in (tmp_path / "rank-0.txt").read_text()


def test_code_that_hangs_with_the_interpreters_lock_is_found(tmp_path):
    def hang() -> None:
        with Watch(tmp_path, rank=0, num_ranks=1, limit=0.2).over("step 3"):
            ctypes.PyDLL(None).usleep(500_000)  # PyDLL keeps the lock during the call.
            raise RuntimeError("a collective failed")

    with pytest.raises(RuntimeError, match=r"rank 0 is in no collective, .* in hang"):
        hang()


def test_a_step_in_time_explains_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"^step 1: wrong$"), Watch(tmp_path, 0, 1, 100.0).over("step 1"):
        raise RuntimeError("wrong")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_notice_to_stop_sets_the_flag(name, capfd):
    """Schedulers, a closed terminal and launchers use different signals."""
    with stop_on_signals() as flag:
        os.kill(os.getpid(), signal.Signals[name])
        deadline = time.monotonic() + 10
        while not flag.requested and time.monotonic() < deadline:
            pass
        assert flag.requested
    assert f"{name}: finishing the step" in "".join(capfd.readouterr())
