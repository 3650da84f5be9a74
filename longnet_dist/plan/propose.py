"""Patterns for a sequence, a number of ranks and a budget: a small search over geometric patterns."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_dist.plan.cost import LayerSize, attention_flops
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.report import report_layer
from longnet_dist.plan.shard import choose_chunk

_SHORTEST, _GROWTHS = 256, (2, 4, 8, 16)


@dataclass(frozen=True)
class Proposal:
    """A pattern within a budget.

    Args:
        pattern: the branches.
        coverage: for each branch, the share of tokens that some head keeps.
        forward_flops: the operations of a layer's forward on all ranks together.
        received_bytes: the bytes that a rank receives in a layer, forward and backward.
        seconds: the modelled time of a layer's attention, forward and backward.
    """

    pattern: Pattern
    coverage: tuple[float, ...]
    forward_flops: int
    received_bytes: int
    seconds: float


def propose_patterns(
    seq_len: int,
    ranks: int,
    layer: LayerSize,
    hardware: Hardware,
    max_flops: float,
    max_received: float,
    count: int = 5,
) -> list[Proposal]:
    """Propose patterns: first the one with which queries see most keys within the budget.

    The patterns looked at are geometric and reach the whole sequence. Their shortest segments are powers of two from
    256 up to the rows of a rank, and grow by 2, 4, 8 or 16; rates grow as lengths do. Only those are proposed whose
    segments align with ranks: a length divides the rows of a rank, is a multiple of them, or reaches the sequence.

    Args:
        seq_len: N.
        ranks: the size of the group.
        layer: the sizes of the layer.
        hardware: the speed of a rank.
        max_flops: the most operations of a layer's forward, all ranks together.
        max_received: the most bytes that a rank receives in a layer, forward and backward.
        count: the most proposals to return.

    Returns:
        At most `count` proposals, by falling `forward_flops`, which are proportional to the pairs of a query and a key.
    """
    candidates = []
    base = min(_SHORTEST, seq_len)
    while base <= max(1, seq_len // ranks) or base == min(_SHORTEST, seq_len):
        for growth in _GROWTHS:
            pattern = Pattern.geometric(seq_len, base, growth)
            flops = attention_flops(pattern, seq_len, layer.num_heads, layer.head_dim, layer.causal, layer.num_kv_heads)
            if flops <= max_flops and _is_aligned(pattern, seq_len, ranks):
                candidates.append((flops, pattern))
        base *= 2
    proposals: list[Proposal] = []
    for flops, pattern in sorted(candidates, key=lambda candidate: -candidate[0]):
        report = report_layer(pattern, seq_len, ranks, layer, hardware)
        if report["received_bytes"] <= max_received and pattern not in [p.pattern for p in proposals]:
            coverage = pattern.coverage(layer.num_kv_heads)
            proposals.append(Proposal(pattern, coverage, flops, report["received_bytes"], report["seconds"]))
        if len(proposals) == count:
            break
    return proposals


def _is_aligned(pattern: Pattern, seq_len: int, ranks: int) -> bool:
    chunk = choose_chunk(pattern, seq_len, ranks)
    return all(chunk % w == 0 or w % chunk == 0 for w in pattern.segment_lengths if w < seq_len)
