"""A failure here means: over ranks, a cache is filled or continued otherwise than on one process."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import DilatedCache, LongNetConfig, Pattern, SequenceMesh, dense_reference, dilated_attention
from longnet_dist.inference.stream import Reading, Repeated, embedding_of_stream, nats_by_position
from longnet_dist.plan.exchange import STRATEGIES
from tests.cases import Case

ALIGNED = Pattern((4, 16, 64, 512), (1, 3, 5, 4))


def read_over_ranks_then_alone(group, case, sizes, strategy):
    """Read parts of the sequence over all ranks, then the rest on each rank alone; compare all with the oracle."""
    arguments = {name: x.detach() if name in "qkv" else x for name, x in case.arguments(case.tensors()).items()}
    expected = dense_reference(**arguments).detach()
    cache = DilatedCache(case.pattern, case.B, case.G, case.D, dtype=torch.float64)
    first = 0
    with torch.no_grad():
        for size in sizes:
            mesh = SequenceMesh(group, case.pattern, size, strategy=strategy)
            part = {name: mesh.split(arguments[name][:, first : first + size].contiguous()) for name in "qkv"}
            out = mesh.join(dilated_attention(**(arguments | part), cache=cache, mesh=mesh))
            assert_close(out, expected[:, first : first + size], rtol=0, atol=1e-12)
            first += size
        for size in (5, 1, case.N):
            part = {name: arguments[name][:, first : first + size] for name in "qkv"}
            out = dilated_attention(**(arguments | part), cache=cache)
            assert_close(out, expected[:, first : first + size], rtol=0, atol=1e-12)
            first += size
    return cache.length


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive]), 2, 4])
def test_reading_over_ranks_and_going_on_alone(pool, world, strategy):
    """A first part of any length; and parts that are whole segments, or lie in one at a multiple of its rate."""
    unaligned = Pattern((8, 24, 50, 200), (1, 3, 7, 4))
    for pattern, sizes in ((unaligned, [83]), (ALIGNED, [60, 4]), (Pattern((8, 32, 512), (1, 2, 4)), [32, 32, 32])):
        for biased in (False, True):
            case = Case(pattern, sum(sizes) + 20, H=4, G=2, B=2, D=8, causal=True, biased=biased)
            assert pool.run(world, read_over_ranks_then_alone, case, sizes, strategy) == [case.N] * world


def error_of_a_misaligned_part(group):
    mesh = SequenceMesh(group, ALIGNED, 30)
    cache = DilatedCache(ALIGNED, 1, 2, 8)
    x = torch.zeros(1, mesh.shard.num_rows, 2, 8)
    dilated_attention(x, x, x, ALIGNED, causal=True, mesh=mesh, cache=cache)
    with pytest.raises(ValueError, match=r"30 tokens over ranks, after 30, do not begin .* \(w=4, r=1\)") as caught:
        dilated_attention(x, x, x, ALIGNED, causal=True, mesh=mesh, cache=cache)
    return str(caught.value)


def error_of_other_heads_on_one_rank(group):
    mesh = SequenceMesh(group, ALIGNED, 64)
    cache = DilatedCache(ALIGNED, 1, 2, 8)
    k = torch.zeros(1, mesh.shard.num_rows, 2, 8)
    q = torch.zeros(1, mesh.shard.num_rows, 3 if mesh.rank == 1 else 4, 8)
    with pytest.raises(ValueError, match=r"rank 1: .*3 query heads cannot share 2 key/value heads") as caught:
        dilated_attention(q, k, k, ALIGNED, causal=True, mesh=mesh, cache=cache)
    return str(caught.value)


def test_wrong_heads_on_one_rank_raise_on_every_rank(pool):
    """Work that precedes the exchange must not fail on that rank alone, while others wait."""
    assert len(set(pool.run(2, error_of_other_heads_on_one_rank, limit=30))) == 1


def test_parts_that_are_cut_otherwise_raise_on_every_rank(pool):
    assert len(set(pool.run(2, error_of_a_misaligned_part))) == 1


CONFIG = LongNetConfig(d_model=16, num_layers=2, num_heads=2, segment_lengths=(8, 32, 512), dilation_rates=(1, 4, 16))


def read_and_generate(group):
    """Return likelihood and embeddings of a stream that is read part by part, and a continuation of a prompt."""
    torch.manual_seed(0)
    model, tokens = CONFIG.build(dtype=torch.float64).eval(), torch.arange(1000) ** 2 % 251
    ranges = nats_by_position(model, Repeated(tokens.numpy(), 1000), (100,), Reading(group=group, part=64))
    vectors = [
        embedding_of_stream(model, Repeated(tokens.numpy(), 1000), pooling, Reading(group=group, part=64))
        for pooling in ("mean", "last")
    ]
    prompt = tokens[None, :301]
    mesh = None if group is None else SequenceMesh(group, CONFIG.pattern, prompt.shape[1])
    return ranges, vectors, model.generate(prompt, 40, temperature=1.0, seed=5, mesh=mesh).tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_streams_and_prompts_are_read_over_ranks(pool, world):
    """The same numbers, and with the same seed the same tokens, as on one process."""
    expected, embedded, continued = read_and_generate(None)
    for ranges, vectors, tokens in pool.run(world, read_and_generate):
        assert tokens == continued
        assert_close(vectors, embedded)
        for actual, exact in zip(ranges, expected, strict=True):
            assert actual == pytest.approx(exact, abs=1e-9)
