"""A failure here means: a mesh of thousands of ranks does not build, or does not build quickly."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest

RANKS, CHUNK = 4096, 16384


def _build(pipe: Any) -> None:
    """One rank of 4,096, alone, on torch's fake process group."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from longnet_dist import Pattern, SequenceMesh
    from longnet_dist.plan.cost import bytes_received

    dist.init_process_group("fake", rank=1234, world_size=RANKS, store=FakeStore())
    began = time.perf_counter()
    pattern = Pattern.geometric(RANKS * CHUNK, base=CHUNK, growth=4)
    mesh = SequenceMesh(dist.group.WORLD, pattern, RANKS * CHUNK)
    seconds = time.perf_counter() - began
    received = bytes_received(pattern, mesh.shard, 32, 128, 2, keep_kv=True, reduce_size=2)
    pipe.send((seconds, mesh.shard.start, mesh.shard.chunk, received))


@pytest.mark.timeout(120)
def test_a_mesh_of_4096_ranks():
    """67 million tokens: seven branches, of which six are gathered."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(theirs,))
    process.start()
    assert ours.poll(100)
    seconds, start, chunk, received = ours.recv()
    process.join()
    assert (start, chunk) == (1234 * CHUNK, CHUNK)
    assert seconds < 10
    assert received[0] == 0
    # Flat: no branch costs more than the whole chunk's keys and values, four ways, times growth.
    assert max(received) <= 4 * CHUNK * 32 * 128 * 2
