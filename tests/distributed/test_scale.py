"""A failure here means: building a mesh of thousands of ranks fails or takes minutes."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest

RANKS, CHUNK = 4096, 16384


def _build(pipe: Any) -> None:
    """Build the mesh of one rank of 4,096 on torch's fake process group, and send what it cost."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from longnet_dist import Pattern, SequenceMesh
    from longnet_dist.plan.cost import LayerSize, bytes_received

    dist.init_process_group("fake", rank=1234, world_size=RANKS, store=FakeStore())
    start = time.perf_counter()
    pattern = Pattern.geometric(RANKS * CHUNK, base=CHUNK, growth=4)
    mesh = SequenceMesh(dist.group.WORLD, pattern, RANKS * CHUNK)
    seconds = time.perf_counter() - start
    gather = ("all_gather",) * len(pattern.branches)
    received = bytes_received(
        pattern, mesh.shard, LayerSize(32, 32, 128, 2, causal=False), gather, keep_kv=True, reduce_size=2
    )
    pipe.send((seconds, mesh.shard.start, mesh.shard.chunk, received))


@pytest.mark.timeout(120)
def test_a_mesh_of_4096_ranks_is_built_in_seconds():
    """For 67 million tokens there are seven branches, six of which are gathered."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_build, args=(sender,))
    process.start()
    assert receiver.poll(100)
    seconds, start, chunk, received = receiver.recv()
    process.join()
    assert (start, chunk) == (1234 * CHUNK, CHUNK)
    assert seconds < 10
    assert received[0] == 0
    # Flat: per branch, at most the keys, the values and both gradients of one chunk.
    assert max(received) <= 4 * CHUNK * 32 * 128 * 2
