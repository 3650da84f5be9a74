"""A failure here means: what a run learns depends on how its ranks are arranged."""

from __future__ import annotations

import pytest

from longnet_dist.training.state import load_model
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


def test_initial_weights_are_the_same_on_any_arrangement_of_ranks(tmp_path):
    """Of a run, whose checkpoint is read, and of an export."""
    job = forked(1, *train(tmp_path / "source", "--steps", 4, "--seq-len", 250))
    assert job.returncode == 0, job.stderr
    load_model(tmp_path / "source").save_pretrained(tmp_path / "export")
    curves = []
    for source in ("source", "export"):
        for ranks in (1, 2):
            folder = tmp_path / f"{source}-{ranks}"
            options = ("--steps", 2, "--seq-len", 500, "--seed", 1, "--init-from", tmp_path / source)
            job = forked(ranks, *train(folder, *options))
            assert job.returncode == 0, job.stderr
            curves.append(losses(folder))
    for curve in curves:
        assert curve == pytest.approx(curves[0], rel=1e-10)
    job = forked(
        2, *train(tmp_path / "wrong", "--seq-len", 250, "--init-from", tmp_path / "source", "--model.ffn-dim", 24)
    )
    assert job.returncode != 0
    assert "blocks.1.ffn.fc1.weight is (64, 16) there and (24, 16) here" in job.stderr
