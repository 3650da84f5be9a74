"""`longnet-dist plan`: the cost of a layer of attention, computed from integers alone."""

from __future__ import annotations

from longnet_dist.cli.options import check_positive
from longnet_dist.cli.units import format_bytes, format_flops
from longnet_dist.plan.cost import LayerSize, attention_flops, bytes_received
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk


def run_plan(
    segment_lengths: tuple[int, ...] = (2048, 8192, 32768),
    dilation_rates: tuple[int, ...] = (1, 4, 16),
    seq_len: int = 32768,
    ranks: int = 4,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    element_size: int = 2,
    keep_kv: bool | None = None,
    causal: bool = True,
) -> None:
    """Print what one layer of attention costs: rows and received bytes per rank, and floating-point operations.

    Args:
        segment_lengths: Segment length of each branch, in tokens.
        dilation_rates: Dilation rate of each branch.
        seq_len: Number of tokens of the whole sequence.
        ranks: Number of ranks over which the sequence is split.
        heads: Number of query heads.
        kv_heads: Number of key/value heads; by default as many as query heads.
        head_dim: Number of dimensions per head.
        element_size: Bytes per element: 2 for bfloat16, 4 for float32. Gradients are sent in at least 4 bytes.
        keep_kv: Whether to keep what other ranks sent for the backward; by default if that is little.
        causal: Whether a query sees only keys at or before its own position.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"seq-len": seq_len, "ranks": ranks, "heads": heads, "head-dim": head_dim, "element-size": element_size}
    check_positive(sizes | {"kv-heads": kv_heads})
    if heads % kv_heads:
        raise ValueError(f"--kv-heads is {kv_heads}; it must divide --heads {heads}")
    pattern = Pattern(segment_lengths, dilation_rates)
    chunk = choose_chunk(pattern, seq_len, ranks)
    shard = Shard(seq_len, chunk, 0, ranks)
    received = bytes_received(pattern, shard, LayerSize(heads, kv_heads, head_dim, element_size, causal), (), keep_kv)
    last_rows = shard.of(ranks - 1).num_rows
    last = "" if last_rows == chunk else f" (the last: {last_rows:,})"
    print(f"{ranks} ranks of {chunk:,} rows{last}; one layer, forward and backward:")
    for branch, count in zip(pattern.branches, received, strict=True):
        cost = f"{count:,} bytes ({format_bytes(count)}) received per rank" if count else "within the chunk"
        print(f"  branch {branch}: {cost}")
    print(f"  all branches: {sum(received):,} bytes ({format_bytes(sum(received))}) received per rank")
    flops = attention_flops(pattern, seq_len, heads, head_dim, causal, kv_heads)
    print(f"  {format_flops(flops)} in the forward, all ranks together")
