"""A failure here means: among thousands of ranks, a mesh takes minutes to build, or a layer receives too much."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest
import torch

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


class IdleKernel:
    """A kernel that computes nothing: its results have the right shapes."""

    @staticmethod
    def unsupported(request):
        return []

    @staticmethod
    def forward(q, k, v, **options):
        return torch.empty_like(q), q.new_empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32)

    @staticmethod
    def backward(dout, q, k, v, *others, **options):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _exchange_at_full_size(pipe: Any, rank: int) -> None:
    """Run a layer of one rank of 4,096, all but the kernel's arithmetic; send the bytes received, and the plan's."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from longnet_dist import Pattern, SequenceMesh, dilated_attention
    from longnet_dist.attention.kernels import KERNELS
    from longnet_dist.plan.cost import LayerSize, bytes_received
    from longnet_dist.plan.hardware import HARDWARE
    from tests.distributed.test_exchanges import CountingBytes

    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    KERNELS["idle"] = IdleKernel
    pattern = Pattern.geometric(RANKS * CHUNK, base=2048, growth=2)
    mesh = SequenceMesh(dist.group.WORLD, pattern, RANKS * CHUNK, hardware=HARDWARE["h200"])
    mesh.agree = lambda *arguments: None  # The fake group's reductions do not reduce.
    q, k, v = (torch.zeros(1, CHUNK, heads, 128, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8))
    with CountingBytes() as count:
        out = dilated_attention(q, k, v, pattern, causal=True, mesh=mesh, kernel="idle")
        out.backward(torch.zeros_like(out))
    layer = LayerSize(32, 8, 128, 2, causal=True)
    pipe.send((sum(count.received), sum(bytes_received(pattern, mesh.shard, layer, mesh.strategies(layer)))))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank", [2047, *(pytest.param(rank, marks=pytest.mark.exhaustive) for rank in (0, 4095))])
def test_a_rank_of_4096_receives_at_most_50_megabytes_a_layer(rank):
    """With 16,384 tokens a rank, 32 heads of 128, 8 key/value heads and bfloat16, forward and backward together."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_exchange_at_full_size, args=(sender, rank))
    process.start()
    assert receiver.poll(100)
    received, planned = receiver.recv()
    process.join()
    assert received == planned <= 50e6
