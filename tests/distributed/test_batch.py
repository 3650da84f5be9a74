"""A failure here means: joint collectives give other results than separate ones, or more of them are started."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.distributed.batch import Batch
from longnet_dist.plan.cost import LayerSize
from longnet_dist.plan.exchange import STRATEGIES
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.shard import Shard
from longnet_dist.plan.sharing import saved_latency
from tests.cases import NO_LATENCY, SLOW_STARTS, Case
from tests.distributed.test_attention import distributed
from tests.distributed.test_exchanges import CountingBytes

WHOLE = Pattern((64, 256, 300, 1000), (1, 4, 3, 5))
"""Three of the branches have one segment over all ranks, if N is at most 256."""


def run_collectives(group, shared):
    """Return the results of drawn collectives of this rank, all started before the first is awaited."""
    mesh = SequenceMesh(group, Pattern((8,), (1,)), 64)
    communicator, batch, rank, size = mesh.everyone, Batch(shared), mesh.rank, mesh.size
    generator = torch.Generator().manual_seed(5)
    parts = []
    for shape in ((3, 2, 1, 4), (0, 2, 1, 4), (5, 3, 1, 4), (2, 7)):
        everyone = torch.randn(size, *shape, generator=generator)
        parts.append(batch.all_gather(communicator, everyone[rank], "gathering"))
        parts.append(batch.reduce_scatter(communicator, everyone + rank, "reducing"))
    for heads, dim in ((2, 4), (3, 4), (1, 4), (2, 6)):
        counts = torch.randint(0, 4, (size, size), generator=generator)
        sent, received = counts[rank].tolist(), counts[:, rank].tolist()
        rows = torch.arange(sum(sent) * heads * 2 * dim).view(-1, heads, 2, dim) + 1e5 * rank
        parts.append(batch.all_to_all(communicator, rows, sent, received, "trading"))
    batch.launch()
    return [part.wait().clone() for part in parts]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_joint_collectives_have_the_results_of_separate_ones(pool, world):
    for joint, separate in zip(
        pool.run(world, run_collectives, True), pool.run(world, run_collectives, False), strict=True
    ):
        for actual, expected in zip(joint, separate, strict=True):
            assert_close(actual, expected)


def output_and_counts(group, case, strategy, hardware, keep_kv):
    """Return the output and gradients, and the numbers of collectives and of bytes received."""
    options = {"strategy": strategy, "hardware": hardware, "keep_kv": keep_kv}
    results = distributed(group, case, **options)
    mesh = SequenceMesh(group, case.pattern, case.N, **options)
    local = {name: mesh.split(x).detach().requires_grad_() for name, x in case.tensors(torch.float64).items()}
    with CountingBytes() as count:
        dilated_attention(**case.arguments(local), mesh=mesh).sum().backward()
    return results, len(count.received), sum(count.received)


@pytest.mark.parametrize("keep_kv", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_branches_that_share_ranks_share_collectives(pool, strategy, causal, keep_kv):
    """The same bytes move, and the results are the oracle's; q, k and v of one branch share collectives, too."""
    case = Case(WHOLE, 251, H=4, G=2, B=2, D=8, causal=causal)
    joint = pool.run(4, output_and_counts, case, strategy, SLOW_STARTS, keep_kv)
    apart = pool.run(4, output_and_counts, case, strategy, NO_LATENCY, keep_kv)
    trades = strategy == "all_to_all"
    per_branch = (6 if trades else 2) + (0 if keep_kv else 2 if trades else 1)
    together = per_branch // 2 + 1 if trades else per_branch
    for (results, number, received), (_, number_apart, received_apart) in zip(joint, apart, strict=True):
        assert (number_apart, received) == (3 * per_branch, received_apart)
        assert number == together
        for actual, expected in zip(results, case.oracle(), strict=True):
            assert_close(actual, expected, rtol=0, atol=1e-12)


def test_large_transfers_stay_separate():
    """They hide behind computation, of which a joint collective hides less: the smallest and largest of layers."""
    pattern = Pattern((1 << 14, 1 << 20, 1 << 21), (1, 1024, 2048))
    shard = Shard(1 << 20, 1 << 14, 0, 64)
    gpu = Hardware("gpu", 4e14, 4e10, 3e-5)
    saved = [
        saved_latency(pattern, ("exchange",) * 3, shard, LayerSize(heads, heads, 128, 2, True), gpu)
        for heads in (1, 64)
    ]
    assert saved == [pytest.approx(2 * 3e-5), 0]
