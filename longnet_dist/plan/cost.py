"""What attention costs a rank: bytes received and floating-point operations, from integers alone."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_dist.plan.blocks import make_plan
from longnet_dist.plan.exchange import STRATEGIES, SharedSegment
from longnet_dist.plan.hardware import HARDWARE, Hardware
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.plan.shard import Shard

FORWARDS_PER_STEP = 3.5
"""The operations of attention's forward and backward together, in forwards."""


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a layer's attention, which decide what it costs.

    Args:
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        element_size: bytes per element of q, k and v, at least 2.
        causal: whether a query sees only keys at or before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int
    causal: bool


def bytes_received(
    pattern: Pattern,
    shard: Shard,
    layer: LayerSize,
    strategies: tuple[str, ...] = (),
    keep_kv: bool | None = None,
    reduce_size: int = 4,
) -> tuple[int, ...]:
    """The bytes that this rank receives for each branch of a layer, forward and backward together.

    The bytes are those of one sequence of a batch. With the strategy "all_gather", if segments align with
    chunks, K and V are kept, and every element has b bytes, they are 4 (w - chunk) / r G D b.

    Args:
        pattern: the branches.
        shard: the rows of this rank.
        layer: the sizes of the layer.
        strategies: the strategy of each branch; by default those that `choose_strategies` chooses.
        keep_kv: whether what arrives is kept for the backward; see `SequenceMesh`.
        reduce_size: bytes per element of the sums of dK and dV in transit; at least `element_size`.

    Returns:
        One number per branch.
    """
    totals = [0] * len(pattern.branches)
    strategies = strategies or choose_strategies(pattern, shard, layer)
    for shared in make_plan(pattern, shard, layer.num_kv_heads, layer.causal, strategies=strategies).shared:
        inputs = 1 if keeps_arrivals(shared.branch, shared.strategy, shard, layer, keep_kv) else 2
        for part in shared.parts:
            totals[shared.number] += _segment_bytes(part.segment, layer, inputs, reduce_size)
    return tuple(totals)


def _segment_bytes(segment: SharedSegment, layer: LayerSize, inputs: int, reduce_size: int) -> int:
    """The bytes that this rank receives for a segment, if q, k and v are sent `inputs` times."""
    size, row = layer.element_size, layer.head_dim * layer.element_size
    if segment.strategy == "all_gather":
        elements = 2 * (segment.num_ranks - 1) * segment.gathered_rows * layer.head_dim
        return elements * (inputs * size + max(size, reduce_size))
    keys = _from_others(segment, segment.key_sources, segment.received_keys)
    key_grads = _from_others(segment, segment.key_targets, segment.sent_keys)
    total = 2 * row * (inputs * keys + key_grads)
    if segment.strategy == "all_to_all":
        team, shared_by, lse = list(segment.team_of(segment.rank)), layer.num_heads // layer.num_kv_heads, max(4, size)
        queries = _from_others(segment, team, segment.received_queries)
        results = _from_others(segment, team, segment.sent_queries)
        # q; dout, out and lse; then out and lse, and dq, on their way back.
        total += shared_by * (queries * (inputs * row + 2 * row + lse) + results * (row + lse + row))
    return total


def _from_others(segment: SharedSegment, ranks: list[int], counts: list[int]) -> int:
    return sum(count for rank, count in zip(ranks, counts, strict=True) if rank != segment.rank)


def rank_flops(pattern: Pattern, shard: Shard, layer: LayerSize, strategies: tuple[str, ...] = ()) -> int:
    """The floating-point operations of one forward on this rank alone; see `attention_flops`."""
    strategies = strategies or choose_strategies(pattern, shard, layer)
    plan = make_plan(pattern, shard, layer.num_kv_heads, layer.causal, strategies=strategies)

    def square(count: int) -> int:
        return count * (count + 1) // 2 if layer.causal else count * count

    pairs = 0
    for block in (*plan.local, *plan.own):
        pairs += block.heads.phases * block.heads.per_phase * block.rows.segments * square(block.rows.count)
    for part in (part for shared in plan.shared for part in shared.parts):
        for remote in part.remote:
            keys = sum(rows.count for rows in remote.key_rows)
            pairs += remote.heads.phases * remote.heads.per_phase * remote.rows.count * keys
        if part.segment.strategy == "all_to_all":
            lo, hi = part.segment.rows_of(part.segment.team_of(part.segment.rank))
            for head in part.segment.heads_of(part.segment.rank):
                inside, before, after = (
                    part.segment.kept(head, *rows)[1]
                    for rows in ((lo, hi), (part.segment.start, lo), (hi, part.segment.stop))
                )
                pairs += square(inside) + inside * (before + (0 if layer.causal else after))
    return 4 * layer.head_dim * pairs * (layer.num_heads // layer.num_kv_heads)


def keeps_arrivals(branch: Branch, strategy: str, shard: Shard, layer: LayerSize, keep_kv: bool | None) -> bool:
    """Return whether the forward keeps what other ranks sent, for the backward; the same on every rank.

    By default (`keep_kv=None`) it does if that takes at most a 32nd of q, k, v and out, which autograd saves anyway.
    """
    if keep_kv is not None:
        return keep_kv
    segment = _TypicalSegment.of(branch, strategy, shard, layer)
    saved = 2 * shard.chunk * (layer.num_heads + layer.num_kv_heads)
    queries = segment.rows_per_rank * layer.num_heads if strategy == "all_to_all" else 0
    return 32 * (queries + 2 * segment.key_rows * layer.num_kv_heads) <= saved


def choose_strategies(
    pattern: Pattern,
    shard: Shard,
    layer: LayerSize,
    hardware: Hardware = HARDWARE["h100"],
    keep_kv: bool | None = None,
) -> tuple[str, ...]:
    """Choose for each branch the strategy with the least modelled time; the same on every rank.

    Args:
        pattern: the branches.
        shard: the rows of any rank.
        layer: the sizes of the layer.
        hardware: the speed of a rank.
        keep_kv: see `SequenceMesh`.
    """
    return tuple(
        min(STRATEGIES, key=lambda name: branch_seconds(branch, name, shard, layer, hardware, keep_kv))
        for branch in pattern.branches
    )


def branch_seconds(
    branch: Branch, strategy: str, shard: Shard, layer: LayerSize, hardware: Hardware, keep_kv: bool | None = None
) -> float:
    """Model the time of a branch on its slowest rank, forward and backward, by one strategy, in seconds.

    It is that of a segment over all its ranks: received bytes over the bandwidth, a latency for each
    collective, and the operations of the rank that has most. What hides behind computation is not modelled.
    """
    segment = _TypicalSegment.of(branch, strategy, shard, layer)
    ranks, teams = segment.num_ranks, segment.num_teams
    kept, own, causal = segment.kept_rows, segment.rows_per_rank, layer.causal
    inputs = 1 if keeps_arrivals(branch, strategy, shard, layer, keep_kv) else 2
    pairs = own * (kept - (kept / teams if strategy == "all_to_all" else own) / 2 if causal else kept)
    seconds = FORWARDS_PER_STEP * 4 * pairs * layer.num_heads * layer.head_dim / hardware.flops
    if ranks == 1:
        return seconds
    row = layer.head_dim * layer.element_size
    if strategy == "all_gather":
        sizes = inputs * layer.element_size + max(4, layer.element_size)
        received, collectives = 2.0 * (kept - own) * layer.num_kv_heads * layer.head_dim * sizes, inputs + 1
    else:
        # If causal, the last rank gets all keys and no gradient, and the first the other way round.
        times = inputs if causal and (strategy == "exchange" or teams > 1) else inputs + 1
        received, collectives = 2.0 * segment.key_rows * layer.num_kv_heads * row * times, inputs + 1
    if strategy == "all_to_all":
        members = ranks / teams
        received += own * (1 - 1 / members) * layer.num_heads * row * (inputs + 4)
        collectives += inputs + 3
    return seconds + received / hardware.bandwidth + collectives * hardware.latency


@dataclass(frozen=True)
class _TypicalSegment:
    """A segment that begins with a chunk: what its ranks hold and receive, per head, without ragged edges.

    Args:
        num_ranks, num_teams: the ranks that hold it, and their teams.
        kept_rows: rows that a head keeps of it.
        rows_per_rank: those on one rank.
        key_rows: the most rows of keys that arrive on a rank, over the number of key/value heads.
    """

    num_ranks: int
    num_teams: int
    kept_rows: float
    rows_per_rank: float
    key_rows: float

    @classmethod
    def of(cls, branch: Branch, strategy: str, shard: Shard, layer: LayerSize) -> _TypicalSegment:
        w = min(branch.segment_length, max(1, shard.seq_len))
        ranks = -(-w // shard.chunk)
        teams = -(-ranks // min(ranks, layer.num_kv_heads)) if strategy == "all_to_all" else ranks
        kept, own = w / branch.dilation_rate, min(w, shard.chunk) / branch.dilation_rate
        keys = own * teams if strategy == "all_to_all" else kept if strategy == "all_gather" else kept - own
        return cls(ranks, teams, kept, own, keys)


def attention_flops(
    pattern: Pattern, seq_len: int, num_heads: int, head_dim: int, causal: bool, num_kv_heads: int | None = None
) -> int:
    """The floating-point operations of one forward over the whole sequence: 4 D per visible pair and head.

    If r divides w and attention is not causal, this is 4 N D sum(w / r^2) per head. The paper's
    2 N d sum(w / r^2) (section 2.3) counts a multiply-add as one operation. A backward costs 2.5
    times as much.

    Args:
        pattern: the branches.
        seq_len: N.
        num_heads: H.
        head_dim: D.
        causal: whether a query sees only keys at or before it.
        num_kv_heads: G; H by default.
    """
    layer = LayerSize(num_heads, num_kv_heads or num_heads, head_dim, 2, causal)
    return rank_flops(pattern, Shard(seq_len, max(seq_len, 1)), layer)
