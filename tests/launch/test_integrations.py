"""A failure here means: an example of a trainer does not run as the documents show it, or two processes are not one."""

from __future__ import annotations

import re

import pytest

from tests.launch.jobs import by_accelerate, forked, run

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]


def curve(said: str) -> list[float]:
    found = [float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", said)]
    assert len(found) == 5, said
    assert found[4] < found[0]
    return found


def test_transformers(tmp_path):
    curves = []
    for ranks in (1, 2, 4):
        done = (run if ranks == 2 else forked)(ranks, "examples/transformers_train.py")
        assert done.returncode == 0, done.stderr
        curves.append(curve(done.stdout))
    assert curves[1] == pytest.approx(curves[0], abs=2e-9)
    assert curves[2] == pytest.approx(curves[0], abs=2e-9)


def test_accelerate(tmp_path):
    alone = forked(1, "examples/accelerate_train.py")
    assert alone.returncode == 0, alone.stderr
    two = by_accelerate(2, tmp_path, "examples/accelerate_train.py")
    assert curve(two) == pytest.approx(curve(alone.stdout), abs=2e-9)


def test_plain_pytorch(tmp_path, monkeypatch):
    """parallelize_module beside FSDP2, compiled on two ranks; on four ranks each sequence's heads are over two."""
    curves = []
    for ranks, heads in ((1, 1), (2, 1), (4, 2)):
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", str(int(ranks != 2)))
        done = (run if ranks == 2 else forked)(ranks, "examples/parallelize.py", heads)
        assert done.returncode == 0, done.stderr
        curves.append(curve(done.stdout))
    assert curves[1] == pytest.approx(curves[0], abs=2e-9)
    assert curves[2] == pytest.approx(curves[0], abs=2e-9)
