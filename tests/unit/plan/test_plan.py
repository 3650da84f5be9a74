"""A failure here means: the plan is wrong before any tensor is: a key is missed, counted twice or sent needlessly."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_dist import Pattern
from longnet_dist.attention.reference import branch_counts
from longnet_dist.plan.blocks import Rows, make_plan
from longnet_dist.plan.cost import (
    FORWARDS_PER_STEP,
    LayerSize,
    attention_flops,
    bytes_received,
    rank_flops,
    saved_bytes,
)
from longnet_dist.plan.hardware import HARDWARE, Hardware
from longnet_dist.plan.propose import propose_patterns
from longnet_dist.plan.report import report_layer
from longnet_dist.plan.shard import Shard, choose_chunk, rank_groups
from tests.cases import patterns

ALIGNED = Pattern((16, 64, 256), (1, 4, 16))


def positions_of(heads, rows: Rows):
    """Yield (head, global positions) for each head and segment of a rectangle."""
    for s in range(rows.segments):
        for f in range(heads.phases):
            for m in range(heads.per_phase):
                head = heads.first + f * heads.phase_step + m * heads.step
                first = rows.position + s * rows.segment_step + f
                yield head, [first + i * rows.rate for i in range(rows.count)]


@settings(max_examples=150, deadline=None)
@given(patterns(), st.integers(0, 50), st.integers(1, 5), st.integers(1, 8), st.integers(0, 4), st.booleans())
def test_every_pair_is_computed_as_often_as_the_oracle_counts_it(pattern, seq_len, num_heads, ranks, extra, causal):
    """For any chunk, the rectangles of all ranks together form the multiset of keys."""
    chunk = max(1, -(-seq_len // ranks)) + extra
    counts = branch_counts(pattern, seq_len, num_heads, causal)
    for rank in range(ranks):
        shard = Shard(seq_len, chunk, rank, ranks)
        plan = make_plan(pattern, shard, num_heads, causal)
        for block in [*plan.local, *plan.own]:
            assert block.rows.first == block.rows.position - shard.start
            for head, rows in positions_of(block.heads, block.rows):
                assert all(shard.start <= p < shard.stop for p in rows)
                for n, i in enumerate(rows):
                    for j in rows[: n + 1] if causal else rows:
                        counts[head, i, j] -= 1
        for block in (b for s in plan.shared for part in s.parts for b in part.remote):
            keys = [dict(positions_of(block.heads, rows)) for rows in block.key_rows]
            for head, rows in positions_of(block.heads, block.rows):
                for i in rows:
                    for j in (j for positions in keys for j in positions[head]):
                        counts[head, i, j] -= 1
    assert (counts == 0).all()


@settings(max_examples=200, deadline=None)
@given(patterns(), st.integers(0, 40), st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_heads_spread_over_ranks_keep_their_phases(pattern, seq_len, total, per_rank, ranks, causal):
    """With any number of heads per rank, the plans of the parts together are the plan of all heads."""

    def pairs(plan, first_head):
        local = [pair for block in [*plan.local, *plan.own] for pair in positions_of(block.heads, block.rows)]
        return sorted((first_head + head, rows) for head, rows in local)

    shard = Shard(seq_len, max(1, -(-seq_len // ranks)), 0, ranks)
    spread = []
    for first in range(0, total, per_rank):
        num_heads = min(per_rank, total - first)
        spread += pairs(make_plan(pattern, shard, num_heads, causal, first, total), first)
    assert sorted(spread) == pairs(make_plan(pattern, shard, total, causal), 0)


@settings(max_examples=100, deadline=None)
@given(patterns(), st.integers(1, 60), st.integers(1, 8), st.integers(0, 4))
def test_groups_form_rounds_of_disjoint_ranks(pattern, seq_len, ranks, extra):
    """The groups are exactly those that the plans of all ranks need."""
    shard = Shard(seq_len, -(-seq_len // ranks) + extra, 0, ranks)
    rounds = rank_groups(pattern, shard)
    for groups in rounds:
        members = [rank for first, last in groups for rank in range(first, last + 1)]
        assert len(members) == len(set(members))
    needed = {
        (part.segment.first_rank, part.segment.last_rank)
        for rank in range(ranks)
        for shared in make_plan(pattern, shard.of(rank), 2, True).shared
        for part in shared.parts
    }
    assert needed == {group for groups in rounds for group in groups}


@pytest.mark.parametrize(
    ("pattern", "seq_len", "ranks", "chunk"),
    [
        (ALIGNED, 1024, 4, 256),
        (ALIGNED, 1000, 4, 256),  # 250 would align with no segment.
        (ALIGNED, 1024, 8, 128),
        (ALIGNED, 128, 8, 16),
        (ALIGNED, 100, 8, 16),  # The last rank holds 4 rows.
        (ALIGNED, 3, 8, 1),  # Five ranks hold none.
        (ALIGNED, 0, 4, 1),
        (Pattern((256,), (1,)), 1000, 3, 334),  # 512 would leave a rank idle, which costs more than misalignment.
        (Pattern((30, 60), (1, 2)), 240, 4, 60),
        (Pattern((1 << 20,), (4,)), 1 << 30, 1 << 10, 1 << 20),
    ],
)
def test_choose_chunk(pattern, seq_len, ranks, chunk):
    assert choose_chunk(pattern, seq_len, ranks) == chunk


@given(patterns(), st.integers(0, 200), st.integers(1, 8))
def test_chunks_hold_the_sequence_and_exceed_an_even_split_by_at_most_a_quarter(pattern, seq_len, ranks):
    chunk = choose_chunk(pattern, seq_len, ranks)
    even = max(1, -(-seq_len // ranks))
    assert even <= chunk <= max(even, even * 5 // 4)


def test_bytes_received_follow_the_formula_and_stay_flat():
    """With twice the ranks and twice N at constant w / r, each rank receives the same bytes per branch."""
    chunk, heads, dim, size = 64, 4, 8, 2
    for ranks in (4, 8, 16, 32):
        pattern = Pattern.geometric(chunk * ranks, base=chunk, growth=2)
        shard = Shard(chunk * ranks, chunk, 1, ranks)
        layer = LayerSize(heads, heads, dim, size, causal=False)
        gather = ("all_gather",) * len(pattern.branches)
        received = bytes_received(pattern, shard, layer, gather, keep_kv=True, reduce_size=size)
        for branch, count in zip(pattern.branches, received, strict=True):
            w, r = branch.segment_length, branch.dilation_rate
            assert count == 4 * (w - chunk) // r * heads * dim * size
            assert count <= 4 * chunk * heads * dim * size


def test_ranks_receive_only_from_ranks_of_their_segment():
    plan = make_plan(ALIGNED, Shard(1024, 32, 5, 32), 4, False)
    segments = [part.segment for shared in plan.shared for part in shared.parts]
    assert [(s.first_rank, s.last_rank) for s in segments] == [(4, 5), (0, 7)]


def test_flops_follow_the_papers_formula():
    """2 N d sum(w / r^2), where a multiply-add counts as one operation (section 2.3)."""
    pattern = Pattern((64, 256), (1, 4))
    N, heads, dim = 1024, 4, 8
    paper = 2 * N * dim * heads * (64 + 256 / 16)
    assert attention_flops(pattern, N, heads, dim, causal=False) == 2 * paper
    assert attention_flops(pattern, N, heads, dim, causal=False, num_kv_heads=4) == 2 * paper


def test_planning_for_4096_ranks_takes_seconds():
    pattern = Pattern.geometric(4096 * 16384, base=16384, growth=4)
    start = time.process_time()
    rank_groups(pattern, Shard(4096 * 16384, 16384, 0, 4096))
    make_plan(pattern, Shard(4096 * 16384, 16384, 1000, 4096), 32, True)
    assert time.process_time() - start < 10


def test_hardware_is_read_by_name_or_from_a_file(tmp_path):
    assert Hardware.read("h100") == HARDWARE["h100"]
    measured = Hardware("mine", 1e10, 2e9, 3e-5)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(measured)))
    assert Hardware.read(path) == measured
    with pytest.raises(ValueError, match=r"hardware is 'h9'; it must be one of cpu, .* or a file"):
        Hardware.read("h9")
    for content in ("{", "[]", '{"name": "x", "flops": 0, "bandwidth": 1, "latency": 1}', '{"name": "x"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"mine.json does not hold what `longnet-dist calibrate` writes"):
            Hardware.read(path)


@pytest.mark.parametrize(("strategy", "low", "high"), [("all_to_all", 1, 1.01), ("all_gather", 1.7, 1.9)])
def test_the_report_of_a_causal_segment_over_eight_ranks(strategy, low, high):
    """Operations of all ranks add up, and the imbalance is that of the rank that has most."""
    pattern, N, layer = Pattern((1 << 17,), (4,)), 1 << 17, LayerSize(8, 8, 64, 2, causal=True)
    report = report_layer(pattern, N, 8, layer, HARDWARE["h100"], strategy)
    of_ranks = [sum(rank_flops(pattern, Shard(N, N // 8, rank, 8), layer, (strategy,))) for rank in range(8)]
    assert report["forward_flops"] == sum(of_ranks) == attention_flops(pattern, N, 8, 64, causal=True)
    assert report["imbalance"] == max(of_ranks) * 8 / sum(of_ranks)
    assert low <= report["imbalance"] <= high
    assert report["saved_bytes"] == N // 8 * 8 * (4 * 64 * 2 + 4) == saved_bytes(Shard(N, N // 8, 0, 8), layer)


def test_proposals_keep_to_the_budget_and_fall_in_operations():
    layer, N, ranks = LayerSize(32, 8, 128, 2, causal=True), 1 << 24, 64
    everything = propose_patterns(N, ranks, layer, HARDWARE["h100"], float("inf"), float("inf"))
    flops = [proposal.forward_flops for proposal in everything]
    assert len(everything) == 5
    assert flops == sorted(flops, reverse=True)
    tight = propose_patterns(N, ranks, layer, HARDWARE["h100"], flops[0] / 10, 8e6)
    assert tight
    for proposal in tight:
        assert proposal.forward_flops <= flops[0] / 10
        assert proposal.received_bytes <= 8e6
        assert proposal.pattern.reach(N) == N
        assert proposal.coverage == proposal.pattern.coverage(8)
        strategies = report_layer(proposal.pattern, N, ranks, layer, HARDWARE["h100"])
        assert strategies["received_bytes"] == proposal.received_bytes
    assert propose_patterns(N, ranks, layer, HARDWARE["h100"], 1, 1) == []


@pytest.mark.parametrize("strategy", ["all_gather", "exchange", "all_to_all"])
@pytest.mark.parametrize("causal", [True, False])
def test_modelled_time_is_that_of_the_busiest_ranks_operations_if_communication_is_free(strategy, causal):
    """Whole segments of a rank count as often as it holds them."""
    pattern, N, layer = Pattern((1 << 10, 1 << 13, 1 << 17), (1, 2, 8)), 1 << 17, LayerSize(8, 8, 64, 2, causal)
    free = Hardware("free", flops=1e12, bandwidth=1e30, latency=1e-30)
    report = report_layer(pattern, N, 8, layer, free, strategy)
    busiest = max(sum(rank_flops(pattern, Shard(N, N // 8, rank, 8), layer, (strategy,) * 3)) for rank in range(8))
    assert report["seconds"] == pytest.approx(FORWARDS_PER_STEP * busiest / free.flops, rel=0.02)
