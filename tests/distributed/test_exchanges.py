"""A failure here means: a strategy of exchange moves other bytes than planned, or its work grows with the ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.attention import exchanges
from longnet_dist.attention.exchanges import tables
from longnet_dist.attention.kernels import KERNELS, eager
from longnet_dist.distributed import collectives
from longnet_dist.plan.cost import LayerSize, branch_traffic, bytes_received, choose_strategies
from longnet_dist.plan.exchange import STRATEGIES
from longnet_dist.plan.shard import Shard
from tests.cases import NO_INTERPRETER, Case, output_and_gradients
from tests.distributed.test_attention import distributed
from tests.pool import forkserver
from tests.unit.attention.test_merging import load_interpreted

MISALIGNED = Pattern((16, 24, 56, 200), (1, 3, 5, 4))


class CountingBytes:
    """Counts the bytes that this rank receives from others, and sends to them, in each collective of rows."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.sent: list[int] = []

    def __enter__(self) -> CountingBytes:
        self.originals = collectives._all_gather_single, collectives._reduce_scatter_single
        collectives._all_gather_single, collectives._reduce_scatter_single = map(self.counted, self.originals)
        self.all_to_all = collectives.dist.all_to_all_single
        collectives.dist.all_to_all_single = self.counted_all_to_all
        return self

    def __exit__(self, *error: object) -> None:
        collectives._all_gather_single, collectives._reduce_scatter_single = self.originals
        collectives.dist.all_to_all_single = self.all_to_all

    def counted(self, collective: Any) -> Any:
        def call(output, x, *args, **kwargs):
            # In a gather and in its dual, a rank does not receive its own part, and sends as much as it receives.
            self.received.append(abs(output.numel() - x.numel()) * x.element_size())
            self.sent.append(self.received[-1])
            return collective(output, x, *args, **kwargs)

        return call

    def counted_all_to_all(self, output, x, received, sent, *, group, async_op):
        rank = torch.distributed.get_rank(group)
        self.received.append((sum(received) - received[rank]) * output[:1].numel() * output.element_size())
        self.sent.append((sum(sent) - sent[rank]) * x[:1].numel() * x.element_size())
        if torch.distributed.get_backend(group) == "fake" and not len(x):  # It refuses to receive without sending.
            output, received = x, sent
        return self.all_to_all(output, x, received, sent, group=group, async_op=async_op)


def count_bytes(group, case, dtype, mesh_options):
    """Return the bytes of each collective of a step that this rank receives, and sends, and the plan of each branch."""
    mesh = SequenceMesh(group, case.pattern, case.N, **mesh_options)
    local = {name: mesh.split(x).detach().requires_grad_() for name, x in case.tensors(dtype).items()}
    dilated_attention(**case.arguments(local), mesh=mesh)  # The first call also compares arguments.
    with CountingBytes() as count:
        dilated_attention(**case.arguments(local), mesh=mesh).sum().backward()
    layer = LayerSize(case.H, case.G, case.D, dtype.itemsize, case.causal)
    reduce_size = mesh.reduce_dtype.itemsize
    planned = branch_traffic(case.pattern, mesh.shard, layer, mesh.strategies(layer), mesh.keep_kv, reduce_size)
    return count.received, count.sent, planned, mesh.shard.chunk


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_each_rank_receives_and_sends_the_bytes_of_the_plan(pool, world, strategy):
    for pattern, N in ((Pattern.geometric(world * 16, base=16, growth=2), world * 16), (MISALIGNED, world * 25 - 7)):
        for causal in (True, False):
            for G, keep_kv, dtype in ((2, None, torch.bfloat16), (4, True, torch.float32), (3, False, torch.float64)):
                case = Case(pattern, N, H=2 * G, G=G, B=1, D=8, causal=causal)
                options = {"strategy": strategy, "keep_kv": keep_kv}
                for received, sent, planned, _ in pool.run(world, count_bytes, case, dtype, options):
                    assert sum(received) == sum(branch.received for branch in planned), (case, options)
                    assert sum(sent) == sum(branch.sent for branch in planned), (case, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep_kv", [True, False])
def test_bytes_of_a_gather_follow_the_formula_and_stay_flat(pool, keep_kv, dtype):
    """With twice the ranks and twice N, each branch moves the same number."""
    by_branch = {}
    for world in (2, 4, 8):
        pattern = Pattern.geometric(world * 16, base=16, growth=2)
        case = Case(pattern, world * 16, H=4, G=4, B=1, D=8, causal=False)
        options = {"strategy": "all_gather", "keep_kv": keep_kv}
        for received, _, traffic, chunk in pool.run(world, count_bytes, case, dtype, options):
            planned = [branch.received for branch in traffic]
            assert sum(received) == sum(planned)
            assert len(received) == (2 if keep_kv else 3) * sum(w > chunk for w in pattern.segment_lengths)
            factor = 4 if keep_kv else 6
            for branch, count in zip(pattern.branches, planned, strict=True):
                w, r = branch.segment_length, branch.dilation_rate
                assert count == factor * (w - chunk) // r * 4 * 8 * dtype.itemsize
                assert by_branch.setdefault(branch, count) == count


def test_gradients_of_bfloat16_travel_in_float32(pool):
    """By default dK and dV are reduced in four bytes a number, and K and V are gathered twice in two bytes each."""
    case = Case(Pattern.geometric(64, base=16, growth=2), 64, H=4, G=4, B=1, D=8, causal=False)
    options = {"strategy": "all_gather", "keep_kv": False}
    expected = sum(2 * (w - 16) // r * 4 * 8 * (2 + 2 + 4) for w, r in ((32, 2), (64, 4)))
    for received, _, planned, _ in pool.run(4, count_bytes, case, torch.bfloat16, options):
        assert sum(received) == sum(branch.received for branch in planned) == expected


def assert_bitwise_equal(group, case):
    over_ranks = distributed(group, case, torch.float32, strategy="all_to_all")
    for actual, expected in zip(over_ranks, output_and_gradients(case, torch.float32), strict=True):
        assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_trading_heads_gives_the_bits_of_one_process(pool, world, causal):
    """The CPU's flash kernel computes a head's segment in the same way wherever it is, and sums keep their order."""
    for pattern, N in ((Pattern((64, 256, 1024), (1, 4, 16)), 1024), (Pattern((64, 192, 1000), (1, 3, 5)), 931)):
        pool.run(world, assert_bitwise_equal, Case(pattern, N, H=16, G=8, B=2, D=16, causal=causal))


class CountingKernel:
    """The eager kernel, counting calls and multiplications of a query with a key."""

    def __init__(self) -> None:
        self.pairs = 0

    unsupported = staticmethod(eager.unsupported)

    def forward(self, q, k, v, *, causal, **options):
        self._count(q, k, causal)
        return eager.forward(q, k, v, causal=causal, **options)

    def backward(self, dout, q, k, *others, causal, **options):
        self._count(q, k, causal)
        return eager.backward(dout, q, k, *others, causal=causal, **options)

    def _count(self, q, k, causal):
        (b, num_queries, heads, _), num_keys = q.shape, k.shape[1]
        self.pairs += b * heads * num_queries * ((num_queries + 1) / 2 if causal else num_keys)


def count_pairs(group, case, strategy):
    KERNELS["counting"] = counting = CountingKernel()
    try:
        mesh = SequenceMesh(group, case.pattern, case.N, strategy=strategy)
        local = {name: mesh.split(x).detach().requires_grad_() for name, x in case.tensors(torch.float32).items()}
        dilated_attention(**case.arguments(local), mesh=mesh, kernel="counting").sum().backward()
    finally:
        del KERNELS["counting"]
    return counting.pairs


def test_causal_work_is_balanced_by_trading_heads(pool):
    """One segment over eight ranks: with a gather the last rank has nearly twice the work of the mean."""
    case = Case(Pattern((1024,), (2,)), 1024, H=8, G=8, B=1, D=8, causal=True)
    for strategy, low, high in (("all_to_all", 1.0, 1.01), ("all_gather", 1.7, 1.9), ("exchange", 1.7, 1.9)):
        pairs = pool.run(8, count_pairs, case, strategy)
        assert low <= max(pairs) / (sum(pairs) / len(pairs)) <= high


def _count_on_a_fake_group(pipe: Any, num_ranks: int, ranks: tuple[int, ...]) -> None:
    """Run some ranks of many on torch's fake group; send what a layer needs, and its bytes, by rank and strategy."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations[str(func)] += 1
            return func(*args, **(kwargs or {}))

    chunk, results = 32, {}
    pattern = Pattern((chunk, 2 * chunk, num_ranks * chunk), (1, 2, 4))
    q, k, v = (torch.zeros(1, chunk, heads, 8, requires_grad=True) for heads in (16, 2, 2))
    layer = LayerSize(16, 2, 8, 4, causal=True)
    for rank in ranks:
        dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
        for strategy, keep_kv in itertools.product(STRATEGIES, (True, False)):
            mesh = SequenceMesh(dist.group.WORLD, pattern, num_ranks * chunk, strategy=strategy, keep_kv=keep_kv)
            mesh.agree = lambda *arguments: None  # The fake group's reductions do not reduce.
            with Counting(), CountingBytes() as count:
                operations: Counter[str] = Counter()
                out = dilated_attention(q, k, v, pattern, causal=True, mesh=mesh)
                retained = out.grad_fn.saved_tensors[-1].nbytes
                out.backward(torch.zeros(1, chunk, 16, 8))
            planned = branch_traffic(pattern, mesh.shard, layer, mesh.strategies(layer), keep_kv)
            found = sum(count.received), sum(count.sent), retained
            expected = tuple(sum(getattr(x, name) for x in planned) for name in ("received", "sent", "retained"))
            results[rank, strategy, keep_kv] = dict(operations), found, expected
        dist.destroy_process_group()
    pipe.send(results)


def test_nothing_is_done_for_each_peer_and_bytes_are_those_of_the_plan():
    """A middle rank needs the same kernels, copies and collectives among 4, 16, 64, 1024 and 4096 ranks."""
    by_size = {}
    for size in (4, 16, 64, 1024, 4096):
        receiver, sender = forkserver().Pipe()
        ranks = (size // 2, 0, 3, size - 1)
        process = forkserver().Process(target=_count_on_a_fake_group, args=(sender, size, ranks))
        process.start()
        sender.close()
        assert receiver.poll(100)
        results = receiver.recv()
        process.join()
        for key, (_, found, expected) in results.items():
            assert found == expected, (size, key)
        by_size[size] = {key[1:]: operations for key, (operations, *_) in results.items() if key[0] == ranks[0]}
    assert by_size[16].keys() == set(itertools.product(STRATEGIES, (True, False)))
    for size, operations in by_size.items():
        assert operations == by_size[16], size


def test_4096_ranks_receive_little():
    """With 16,384 tokens a rank in bfloat16, a layer moves at most 50 MB to a rank, forward and backward together."""
    pattern = Pattern.geometric(4096 * 16384, base=2048, growth=2)
    layer = LayerSize(32, 8, 128, 2, causal=True)
    for rank in (0, 2047, 4095):
        shard = Shard(4096 * 16384, 16384, rank, 4096)
        assert sum(bytes_received(pattern, shard, layer)) <= 50e6


def test_auto_chooses_what_moves_least_between_few_and_between_many_ranks():
    layer, chunk = LayerSize(32, 8, 128, 2, causal=True), 16384
    pattern = Pattern((2 * chunk, 64 * chunk), (16, 512))
    assert choose_strategies(pattern, Shard(64 * chunk, chunk, 0, 64), layer) == ("exchange", "all_to_all")


@pytest.mark.parametrize(
    ("batch", "D", "dtype"), [(1, 8, torch.bfloat16), (2, 24, torch.float32), (3, 1, torch.float64)]
)
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_triton_gathers_the_rows_that_torch_gathers(batch, D, dtype, monkeypatch):
    """Several programs copy rows of heads that come before or after tokens in memory, and rows of a buffer."""
    if NO_INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(batch, 50, 4, D, generator=generator).to(dtype)
    v = torch.randn(batch, 4, 50, D + 2, generator=generator).to(dtype).transpose(1, 2)[..., :D]
    rows, heads = (torch.randint(size, (300,), generator=generator) for size in (50, 4))
    kept, index = tables.KeptRows(rows, heads), torch.randint(300, (3, 40, 2), generator=generator)
    buffer = kept.pack_both(k, v)
    expected = [buffer, *tables.unpack_both(buffer, index)]
    monkeypatch.setattr(exchanges, "triton_rows", load_interpreted("exchanges.triton_rows"), raising=False)
    monkeypatch.setattr(tables, "uses_triton", lambda x: True)
    actual = [kept.pack_both(k, v), *tables.unpack_both(buffer, index)]
    assert_close(actual, expected, rtol=0, atol=0)
    assert kept.pack_both(k[:0], v[:0]).shape == (300, 2, 0, D)
