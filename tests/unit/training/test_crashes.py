"""A failure here means: a crash at some moment of a save costs a checkpoint that was complete."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

from longnet_dist.checkpoints.checkpoints import Checkpoints
from tests.pool import forkserver
from tests.unit.training.test_checkpoint import newest, state

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
"""The events of Python that precede a change of the file system, and more."""


def save_and_crash(folder, crash_at):
    """Save step 4; end the process, as SIGKILL would, just before the file system's event of this number."""
    torch.set_num_threads(1)
    events = 0

    def watch(event, arguments):
        nonlocal events
        if event in CHANGES and str(folder) in str(arguments[0]):
            events += 1
            if events == crash_at:
                os._exit(9)

    sys.addaudithook(watch)
    checkpoints = Checkpoints(folder)
    checkpoints.save(4, state(4.0), {"step": 4})
    assert checkpoints.problem is None
    os._exit(0)


@pytest.mark.slow
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Before every file that is opened, renamed or removed; the next save removes what is left of the crash."""
    before = Checkpoints(tmp_path / "before")
    for step in (2, 3):
        before.save(step, state(float(step)), {"step": step})
    found = []
    for crash_at in range(1, 1000):
        folder = tmp_path / "after"
        shutil.copytree(tmp_path / "before", folder)
        process = forkserver().Process(target=save_and_crash, args=(folder, crash_at))
        process.start()
        process.join(60)
        found.append(newest(folder))
        Checkpoints(folder).save(5, state(5.0), {"step": 5})
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{found[-1]:08d}", "step-00000005"]
        assert newest(folder) == 5
        shutil.rmtree(folder)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
    assert len(found) > 12
    assert found == sorted(found)
    assert set(found) == {3, 4}
