"""A failure here means: what a run learns depends on how its ranks are arranged."""

from __future__ import annotations

import pytest

from tests.launch.jobs import forked, losses, run, train

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(300)]


def test_every_arrangement_of_ranks_has_the_same_losses(tmp_path):
    """(dp_replicate, dp_shard, sp), with the same seed, data and accumulation: equal within rounding."""
    curves = {}
    for degrees in ((1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)):
        folder = tmp_path / "-".join(map(str, degrees))
        axes = [f"--parallel.{axis}={n}" for axis, n in zip(("dp-replicate", "dp-shard", "sp"), degrees, strict=True)]
        options = ("--steps", 4, "--seq-len", 250, "--batch-size", 4, "--grad-accumulation", 2)
        job = forked(degrees[0] * degrees[1] * degrees[2], *train(folder, *options, *axes))
        assert job.returncode == 0, job.stderr
        curves[degrees] = losses(folder)
    for curve in curves.values():
        assert curve == pytest.approx(curves[1, 1, 1], rel=1e-10)


def test_an_arrangement_that_does_not_fit_the_ranks_is_an_error(tmp_path):
    job = run(2, *train(tmp_path / "run", "--parallel.dp-shard", 3))
    assert job.returncode != 0
    assert "does not make the 2 ranks of this job" in job.stderr
