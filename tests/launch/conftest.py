"""Fixtures of the tests that start real jobs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest

from tests.launch.jobs import TWELVE_STEPS, losses, run, train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `TWELVE_STEPS` on two ranks, started by torchrun, without a disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(2, *train(folder, *TWELVE_STEPS))
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.fixture(scope="session")
def ray_nodes(s3_server: None) -> Iterator[object]:
    """One Ray cluster for all tests, whose nodes can reach the store; see tests/launch/on_ray/ray_cluster.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own warnings.
        from tests.launch.on_ray.ray_cluster import Nodes

        nodes = Nodes()
    yield nodes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves sockets to the garbage collector.
        nodes.close()
        del nodes
        gc.collect()
