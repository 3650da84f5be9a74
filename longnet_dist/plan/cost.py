"""What attention costs a rank: bytes received and floating-point operations, from integers alone."""

from __future__ import annotations

from longnet_dist.plan.blocks import make_plan
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard


def bytes_received(
    pattern: Pattern,
    shard: Shard,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
    keep_kv: bool = False,
    reduce_size: int = 4,
) -> tuple[int, ...]:
    """The bytes that this rank receives for each branch of a layer, forward and backward together.

    K and V are gathered in the forward, and again in the backward unless they are kept; dK and dV
    are reduce-scattered. The bytes are those of one sequence of a batch. If segments align with chunks,
    K and V are kept, and every element has b bytes, they are 4 (w - chunk) / r G D b.

    Args:
        pattern: the branches.
        shard: the rows of this rank.
        num_kv_heads: G.
        head_dim: D.
        element_size: bytes per element of K and V.
        keep_kv: whether gathered keys and values are kept for the backward; see `SequenceMesh`.
        reduce_size: bytes per element of dK and dV in transit; at least `element_size`.

    Returns:
        One number per branch.
    """
    bytes_per_element = (2 if keep_kv else 4) * element_size + 2 * max(element_size, reduce_size)
    totals = []
    for branch in pattern.branches:
        one = Pattern((branch.segment_length,), (branch.dilation_rate,), pattern.head_phases)
        rows = sum((s.num_ranks - 1) * s.sent_rows for s in make_plan(one, shard, num_kv_heads, False).shared)
        totals.append(bytes_per_element * rows * num_kv_heads * head_dim)
    return tuple(totals)


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
    num_kv_heads = num_kv_heads or num_heads
    pairs = 0
    for block in make_plan(pattern, Shard(seq_len, max(seq_len, 1)), num_kv_heads, causal).local:
        n = block.rows.count
        rectangles = block.heads.phases * block.heads.per_phase * block.rows.segments
        pairs += rectangles * (n * (n + 1) // 2 if causal else n * n)
    return 4 * head_dim * pairs * (num_heads // num_kv_heads)
