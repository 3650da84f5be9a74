"""What a layer, and a model, cost over many ranks, in one dict that can be printed or written as JSON."""

from __future__ import annotations

from typing import Any

from longnet_dist.plan.cost import (
    FORWARDS_PER_STEP,
    LayerSize,
    branch_traffic,
    choose_strategies,
    model_branch,
    rank_flops,
    saved_bytes,
)
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk, is_shared
from longnet_dist.plan.sharing import saved_latency


def report_layer(
    pattern: Pattern,
    seq_len: int,
    ranks: int,
    layer: LayerSize,
    hardware: Hardware,
    strategy: str = "auto",
    keep_kv: bool | None = None,
) -> dict[str, Any]:
    """Return the costs of one layer for one sequence, forward and backward, by branch and in all.

    Bytes are exact, and the most of the ranks looked at: all of them up to 16, and otherwise the first, the middle and
    the last one, and the last one of a segment of each branch. `imbalance` is the most operations of these ranks, over
    the mean of all ranks that hold rows. Seconds are those of `model_branch`; those in all are fewer by what joint
    collectives save (`saved_latency`).

    Memory is that of one rank: `saved_bytes` are q, k, v, out and lse; `retained_bytes` is what exchanges keep for
    the backward; `buffer_bytes` bounds what collectives take for a short time, in the forward or the backward.

    Args:
        pattern: the branches.
        seq_len: N.
        ranks: the size of the group.
        layer: the sizes of the layer.
        hardware: the speed of a rank.
        strategy: one strategy for all branches, or "auto".
        keep_kv: see `SequenceMesh`.
    """
    chunk = choose_chunk(pattern, seq_len, ranks)
    shard = Shard(seq_len, chunk, 0, ranks)
    strategies = (strategy,) * len(pattern.branches)
    if strategy == "auto":
        strategies = choose_strategies(pattern, shard, layer, hardware, keep_kv)
    busy = -(-seq_len // chunk)
    spans = [min(busy, -(-w // chunk)) for w in pattern.segment_lengths]
    # The first and last ranks of a segment receive and compute least and most.
    numbers = range(busy) if busy <= 16 else {0, busy // 2, busy - 1, *(span - 1 for span in spans)}
    shards = [shard.of(rank) for rank in sorted(numbers)]
    by_rank = [branch_traffic(pattern, s, layer, strategies, keep_kv) for s in shards]
    flops_by_rank = [rank_flops(pattern, s, layer, strategies) for s in shards]
    flops = rank_flops(pattern, Shard(seq_len, max(seq_len, 1)), layer)
    saved = saved_latency(pattern, strategies, shard, layer, hardware, keep_kv)
    branches: list[dict[str, Any]] = []
    for number, (branch, coverage, name) in enumerate(
        zip(pattern.branches, pattern.coverage(layer.num_kv_heads), strategies, strict=True)
    ):
        traffic = [rank[number] for rank in by_rank]
        model = model_branch(branch, name, shard, layer, hardware, keep_kv)
        branches.append(
            {
                "segment_length": branch.segment_length,
                "dilation_rate": branch.dilation_rate,
                "coverage": coverage,
                "ranks_per_segment": spans[number],
                "strategy": name if is_shared(branch, shard) else None,
                "peers": max(rank.peers for rank in traffic),
                "received_bytes": max(rank.received for rank in traffic),
                "sent_bytes": max(rank.sent for rank in traffic),
                "retained_bytes": max(rank.retained for rank in traffic),
                "forward_flops": flops[number],
                "imbalance": max(rank[number] for rank in flops_by_rank) * busy / max(1, flops[number]),
                "seconds": model.seconds,
            }
        )
    report: dict[str, Any] = {
        "seq_len": seq_len,
        "ranks": ranks,
        "rows_per_rank": chunk,
        "last_rows": shard.of(busy - 1).num_rows,
        "idle_ranks": ranks - busy,
        "reach": pattern.reach(seq_len),
        "branches": branches,
        "received_bytes": max(sum(t.received for t in rank) for rank in by_rank),
        "sent_bytes": max(sum(t.sent for t in rank) for rank in by_rank),
        "forward_flops": sum(flops),
        "imbalance": max(map(sum, flops_by_rank)) * busy / max(1, sum(flops)),
        "saved_bytes": saved_bytes(shard, layer),
        "retained_bytes": max(sum(t.retained for t in rank) for rank in by_rank),
        "buffer_bytes": max(
            max(sum(t.forward_buffers for t in rank), sum(t.backward_buffers for t in rank)) for rank in by_rank
        ),
        "hardware": hardware.name,
        "seconds": sum(branch["seconds"] for branch in branches) - saved,
    }
    return report | {"others": _others(pattern, seq_len, busy, chunk, layer, hardware, report["forward_flops"])}


def _others(
    pattern: Pattern, seq_len: int, ranks: int, chunk: int, layer: LayerSize, hardware: Hardware, flops: int
) -> dict[str, dict[str, float]]:
    """Return what other methods send to a rank in a layer, and their time, forward and backward, by their formulas.

    Work is taken to be balanced, and dense attention computes every pair.
    """
    row = layer.head_dim * layer.element_size
    kv, q = 2 * layer.num_kv_heads * row, layer.num_heads * row
    kept = sum(seq_len / branch.dilation_rate for branch in pattern.branches if branch.segment_length > chunk)
    dense = 4.0 * layer.head_dim * layer.num_heads * seq_len * (seq_len / 2 if layer.causal else seq_len)
    methods = {
        # K and V go round in the forward and the backward, and their gradients with them in the backward.
        "ring attention (dense)": (3.0 * (ranks - 1) * chunk * kv, dense, 3 * (ranks - 1)),
        # q, K, V and out are traded in the forward, and all gradients in the backward.
        "Ulysses (dense, ranks up to the heads)": (2.0 * chunk * (ranks - 1) / ranks * (2 * q + kv), dense, 8),
        "kept rows gathered over all ranks": (2.0 * kept * (ranks - 1) / ranks * kv, flops, 2 * len(pattern.branches)),
    }
    return {
        name: {
            "received_bytes": received,
            "seconds": FORWARDS_PER_STEP * operations / ranks / hardware.flops
            + (received / hardware.bandwidth + collectives * hardware.latency if ranks > 1 else 0),
        }
        for name, (received, operations, collectives) in methods.items()
    }


def report_model(
    report: dict[str, Any], layer: LayerSize, layers: int, vocab_size: int, hardware: Hardware
) -> dict[str, Any]:
    """Return the costs of a model with a feed-forward network of four times its width, and tied embeddings.

    `activation_bytes` is what attention keeps per rank for the backward in all layers, without checkpointing;
    projections and feed-forward networks are not counted. `step_seconds` takes matrices to be as fast as attention.

    Args:
        report: what `report_layer` returned.
        layer: the sizes of a layer.
        layers: the number of transformer blocks.
        vocab_size: the number of token ids.
        hardware: the speed of a rank.
    """
    width, kv_width = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    matrices = layers * (2 * width * width + 2 * width * kv_width + 8 * width * width) + vocab_size * width
    attention = layers * report["forward_flops"] * FORWARDS_PER_STEP
    dense = 6 * matrices * report["seq_len"]
    busy = report["ranks"] - report["idle_ranks"]
    return {
        "layers": layers,
        "parameters": matrices,
        "step_flops": dense + attention,
        "attention_share": attention / (dense + attention),
        "step_received_bytes": layers * report["received_bytes"],
        "step_sent_bytes": layers * report["sent_bytes"],
        "activation_bytes": layers * (report["saved_bytes"] + report["retained_bytes"]),
        "step_seconds": layers * report["seconds"] + dense / busy / hardware.flops,
    }
