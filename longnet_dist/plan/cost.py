"""What attention costs a rank: bytes that move and stay, and floating-point operations, from integers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class Traffic(NamedTuple):
    """What a branch of a layer takes of a rank to communicate, in bytes, for one sequence of a batch.

    Args:
        peers: the other ranks of the segments that this rank shares.
        received: bytes from other ranks, forward and backward together.
        sent: bytes to other ranks, likewise. A gather counts as sent to each of its ranks.
        retained: what arrived in the forward and stays in memory until the backward.
        forward_buffers: the inputs and outputs of all collectives of the forward. Exchanges of all branches overlap,
            so this bounds the memory that they take for a short time. What kernels need is not counted.
        backward_buffers: those of the backward.
    """

    peers: int = 0
    received: int = 0
    sent: int = 0
    retained: int = 0
    forward_buffers: int = 0
    backward_buffers: int = 0


class _Collective(NamedTuple):
    """One collective on one rank: bytes from others, bytes to others, and bytes of its input and output."""

    received: int
    sent: int
    buffers: int


def branch_traffic(
    pattern: Pattern,
    shard: Shard,
    layer: LayerSize,
    strategies: tuple[str, ...] = (),
    keep_kv: bool | None = None,
    reduce_size: int = 4,
) -> tuple[Traffic, ...]:
    """Return what this rank communicates for each branch of a layer.

    With the strategy "all_gather", if segments align with chunks, K and V are kept, and every element has
    b bytes, a rank receives 4 (w - chunk) / r G D b.

    Args:
        pattern: the branches.
        shard: the rows of this rank.
        layer: the sizes of the layer.
        strategies: the strategy of each branch; by default those that `choose_strategies` chooses.
        keep_kv: whether what arrives is kept for the backward; see `SequenceMesh`.
        reduce_size: bytes per element of the sums of dK and dV in transit; at least `element_size`.
    """
    traffic = [Traffic() for _ in pattern.branches]
    strategies = strategies or choose_strategies(pattern, shard, layer)
    for shared in make_plan(pattern, shard, layer.num_kv_heads, layer.causal, strategies=strategies).shared:
        keeps = keeps_arrivals(shared.branch, shared.strategy, shard, layer, keep_kv)
        queries, keys = shared.arriving_rows
        row = layer.head_dim * layer.element_size
        retained = row * (queries * (layer.num_heads // layer.num_kv_heads) + 2 * keys) if keeps else 0
        before, parts = traffic[shared.number], [part.segment for part in shared.parts]
        both = [_collectives(segment, layer, keeps, reduce_size) for segment in parts]
        forward = [collective for direction, _ in both for collective in direction]
        backward = [collective for _, direction in both for collective in direction]
        traffic[shared.number] = Traffic(
            before.peers + sum(segment.num_ranks - 1 for segment in parts),
            before.received + sum(c.received for c in forward + backward),
            before.sent + sum(c.sent for c in forward + backward),
            before.retained + retained,
            before.forward_buffers + sum(c.buffers for c in forward),
            before.backward_buffers + sum(c.buffers for c in backward),
        )
    return tuple(traffic)


def bytes_received(
    pattern: Pattern,
    shard: Shard,
    layer: LayerSize,
    strategies: tuple[str, ...] = (),
    keep_kv: bool | None = None,
    reduce_size: int = 4,
) -> tuple[int, ...]:
    """Return the bytes that this rank receives for each branch of a layer; see `branch_traffic`."""
    traffic = branch_traffic(pattern, shard, layer, strategies, keep_kv, reduce_size)
    return tuple(branch.received for branch in traffic)


def saved_bytes(shard: Shard, layer: LayerSize) -> int:
    """The bytes of q, k, v, out and lse of this rank, which autograd saves of a layer for any number of branches."""
    vectors = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim * layer.element_size
    return shard.num_rows * (vectors + layer.num_heads * max(4, layer.element_size))


def _collectives(
    segment: SharedSegment, layer: LayerSize, keeps: bool, reduce_size: int
) -> tuple[list[_Collective], list[_Collective]]:
    """The collectives of a segment on this rank in a forward, and in a backward."""
    size, row = layer.element_size, layer.head_dim * layer.element_size
    if segment.strategy == "all_gather":

        def gather(element_size: int) -> _Collective:
            part, others = 2 * segment.gathered_rows * layer.head_dim * element_size, segment.num_ranks - 1
            return _Collective(others * part, others * part, (others + 2) * part)

        inputs, key_grads = [gather(size)], gather(max(size, reduce_size))
        return inputs, [*([] if keeps else inputs), key_grads]

    def trade(size: int, sources: _Rows, targets: _Rows) -> _Collective:
        buffers = size * (sum(sources[1]) + sum(targets[1]))
        return _Collective(size * _others(segment, *sources), size * _others(segment, *targets), buffers)

    sources, targets = (segment.key_sources, segment.received_keys), (segment.key_targets, segment.sent_keys)
    inputs, key_grads = [trade(2 * row, sources, targets)], trade(2 * row, targets, sources)
    if segment.strategy == "exchange":
        return inputs, [*([] if keeps else inputs), key_grads]
    members, lse = list(segment.team_of(segment.rank)), max(4, size)
    attended, own = (members, segment.received_queries), (members, segment.sent_queries)
    shared_by = layer.num_heads // layer.num_kv_heads
    inputs.append(trade(shared_by * row, attended, own))
    results = trade(shared_by * (row + lse), own, attended)
    gradients = trade(shared_by * (2 * row + lse), attended, own), trade(shared_by * row, own, attended)
    return [*inputs, results], [*([] if keeps else inputs), *gradients, key_grads]


_Rows = tuple[list[int], list[int]]
"""Ranks, and the number of rows from or to each."""


def _others(segment: SharedSegment, ranks: list[int], counts: list[int]) -> int:
    return sum(count for rank, count in zip(ranks, counts, strict=True) if rank != segment.rank)


def rank_flops(pattern: Pattern, shard: Shard, layer: LayerSize, strategies: tuple[str, ...] = ()) -> tuple[int, ...]:
    """The floating-point operations of one forward on this rank alone, for each branch; see `attention_flops`."""
    strategies = strategies or choose_strategies(pattern, shard, layer)
    plan = make_plan(pattern, shard, layer.num_kv_heads, layer.causal, strategies=strategies)

    def square(count: int) -> int:
        return count * (count + 1) // 2 if layer.causal else count * count

    pairs = [0] * len(pattern.branches)
    for block in (*plan.local, *plan.own):
        heads = block.heads.phases * block.heads.per_phase
        pairs[block.branch] += heads * block.rows.segments * square(block.rows.count)
    for number, part in ((shared.number, part) for shared in plan.shared for part in shared.parts):
        for remote in part.remote:
            keys = sum(rows.count for rows in remote.key_rows)
            pairs[number] += remote.heads.phases * remote.heads.per_phase * remote.rows.count * keys
        if part.segment.strategy == "all_to_all":
            lo, hi = part.segment.rows_of(part.segment.team_of(part.segment.rank))
            for head in part.segment.heads_of(part.segment.rank):
                inside, before, after = (
                    part.segment.kept(head, *rows)[1]
                    for rows in ((lo, hi), (part.segment.start, lo), (hi, part.segment.stop))
                )
                pairs[number] += square(inside) + inside * (before + (0 if layer.causal else after))
    return tuple(4 * layer.head_dim * count * (layer.num_heads // layer.num_kv_heads) for count in pairs)


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
        min(STRATEGIES, key=lambda name: model_branch(branch, name, shard, layer, hardware, keep_kv))
        for branch in pattern.branches
    )


class BranchModel(NamedTuple):
    """A branch on its slowest rank, by a model without ragged edges: see `model_branch`.

    Args:
        seconds: the time of a forward and a backward.
        received: bytes from other ranks.
        retained: bytes that arrived and stay in memory until the backward.
        collectives: the number of collectives; 0 if nothing is sent.
    """

    seconds: float
    received: float
    retained: float
    collectives: int


def model_branch(
    branch: Branch, strategy: str, shard: Shard, layer: LayerSize, hardware: Hardware, keep_kv: bool | None = None
) -> BranchModel:
    """Model a branch on its slowest rank, forward and backward, by one strategy, in a time independent of the ranks.

    The time is that of a segment over all its ranks, or of all segments that a rank holds whole: received bytes over
    the bandwidth, a latency for each collective, and the operations of the rank that has most. What hides behind
    computation is not modelled.
    """
    segment = _TypicalSegment.of(branch, strategy, shard, layer)
    ranks, teams = segment.num_ranks, segment.num_teams
    kept, own, causal = segment.kept_rows, segment.rows_per_rank, layer.causal
    keeps = keeps_arrivals(branch, strategy, shard, layer, keep_kv)
    inputs = 1 if keeps else 2
    pairs = own * (kept - (kept / teams if strategy == "all_to_all" else own) / 2 if causal else kept)
    seconds = FORWARDS_PER_STEP * 4 * pairs * layer.num_heads * layer.head_dim / hardware.flops
    if ranks == 1:
        w = min(branch.segment_length, max(1, shard.seq_len))
        return BranchModel(seconds * max(1, min(shard.chunk, shard.seq_len) / w), 0, 0, 0)
    row = layer.head_dim * layer.element_size
    if strategy == "all_gather":
        sizes = inputs * layer.element_size + max(4, layer.element_size)
        received, collectives = 2.0 * (kept - own) * layer.num_kv_heads * layer.head_dim * sizes, inputs + 1
    else:
        # If causal, the last rank gets all keys and no gradient, and the first the other way round.
        times = inputs if causal and (strategy == "exchange" or teams > 1) else inputs + 1
        received, collectives = 2.0 * segment.key_rows * layer.num_kv_heads * row * times, inputs + 1
    retained = 2.0 * segment.key_rows * layer.num_kv_heads * row
    if strategy == "all_to_all":
        members = ranks / teams
        received += own * (1 - 1 / members) * layer.num_heads * row * (inputs + 4)
        retained += own * layer.num_heads * row
        collectives += inputs + 3
    seconds += received / hardware.bandwidth + collectives * hardware.latency
    return BranchModel(seconds, received, retained if keeps else 0, collectives)


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
    return sum(rank_flops(pattern, Shard(seq_len, max(seq_len, 1)), layer))
