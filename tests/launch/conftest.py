"""Fixtures of the tests that start real jobs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_nodes(s3_server: None) -> Iterator[object]:
    """One Ray cluster for all, whose nodes have what it takes to reach the store; see tests/launch/ray_cluster.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of ray's own.
        from tests.launch.ray_cluster import Nodes

        nodes = Nodes()
    yield nodes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Sockets that ray leaves to the collector.
        nodes.close()
        del nodes
        gc.collect()
