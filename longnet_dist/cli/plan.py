"""`longnet-dist plan`: the cost of a model over many ranks, computed from integers alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from longnet_dist.cli.options import check_positive
from longnet_dist.paths import write_whole
from longnet_dist.plan.cost import (
    FORWARDS_PER_STEP,
    LayerSize,
    attention_flops,
    branch_seconds,
    bytes_received,
    choose_strategies,
    rank_flops,
)
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk, is_shared
from longnet_dist.units import format_bytes, format_flops


def run_plan(
    segment_lengths: tuple[int, ...] | None = None,
    dilation_rates: tuple[int, ...] | None = None,
    geometric: tuple[int, int] = (1024, 4),
    seq_len: int = 32768,
    ranks: int = 4,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    layers: int = 12,
    vocab_size: int = 257,
    element_size: int = 2,
    strategy: Literal["auto", "all_gather", "all_to_all", "exchange"] = "auto",
    keep_kv: bool | None = None,
    causal: bool = True,
    hardware: str = "h100",
    as_json: bool = False,
) -> None:
    """Print what a model costs over many ranks: rows, received bytes and operations, by branch and in all.

    Args:
        segment_lengths: Segment length of each branch, in tokens; by default those of --geometric.
        dilation_rates: Dilation rate of each branch.
        geometric: Shortest segment length, and the factor by which lengths and rates grow, up to --seq-len.
        seq_len: Number of tokens of the whole sequence.
        ranks: Number of ranks over which the sequence is split.
        heads: Number of query heads.
        kv_heads: Number of key/value heads; by default as many as query heads.
        head_dim: Number of dimensions per head; the width of the model is heads x head_dim.
        layers: Number of transformer blocks.
        vocab_size: Number of token ids.
        element_size: Bytes per element: 2 for bfloat16, 4 for float32. Summed gradients are sent in at least 4 bytes.
        strategy: How queries meet the keys of other ranks; auto takes the fastest for each branch.
        keep_kv: Whether to keep what other ranks sent for the backward; by default if that is little.
        causal: Whether a query sees only keys at or before its own position.
        hardware: Speed of a rank, by which times are estimated: cpu, a100, h100, h200, b200, or a file that
            `longnet-dist calibrate` wrote.
        as_json: Print one JSON object.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"seq-len": seq_len, "ranks": ranks, "heads": heads, "head-dim": head_dim, "element-size": element_size}
    check_positive(sizes | {"kv-heads": kv_heads, "layers": layers, "vocab-size": vocab_size})
    if heads % kv_heads:
        raise ValueError(f"--kv-heads is {kv_heads}; it must divide --heads {heads}")
    if (segment_lengths is None) != (dilation_rates is None):
        raise ValueError("--segment-lengths and --dilation-rates go together: give both, or neither")
    if segment_lengths is None or dilation_rates is None:
        pattern = Pattern.geometric(seq_len, *geometric)
    else:
        pattern = Pattern(segment_lengths, dilation_rates)
    layer = LayerSize(heads, kv_heads, head_dim, element_size, causal)
    plan = _plan(pattern, seq_len, ranks, layer, strategy, keep_kv, Hardware.read(hardware))
    plan |= _whole_model(plan, layers, vocab_size, heads * head_dim, kv_heads * head_dim, seq_len)
    print(json.dumps(plan, indent=2) if as_json else _describe(plan))


def run_calibrate(
    out: Path = Path("hardware.json"),
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    heads: int = 8,
    head_dim: int = 64,
    rows: int = 4096,
) -> None:
    """Measure how fast this machine, or the ranks that torchrun started, compute attention and communicate.

    The file is for `longnet-dist plan --hardware FILE` and `longnet-dist train --hardware FILE`.

    Args:
        out: File to write, .json.
        dtype: Dtype of the attention; by default float32 on CPUs and bfloat16 on GPUs.
        heads: Number of heads.
        head_dim: Number of dimensions per head.
        rows: Number of tokens of the attention that is measured.
    """
    import torch
    import torch.distributed as dist

    from longnet_dist.attention.calibration import calibrate
    from longnet_dist.training.config import TrainConfig
    from longnet_dist.training.processes import init_processes

    if out.suffix != ".json":
        raise ValueError(f"--out is {out}; its name must end in .json")
    check_positive({"heads": heads, "head-dim": head_dim, "rows": rows})
    with init_processes(TrainConfig()) as device:
        group = dist.group.WORLD if dist.is_initialized() else None
        name = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        sizes = {"num_heads": heads, "head_dim": head_dim, "rows": rows}
        hardware = calibrate(group, dtype=getattr(torch, name), name=out.stem, **sizes)
        if group is None or dist.get_rank(group) == 0:
            write_whole(out, json.dumps(dataclasses.asdict(hardware), indent=1) + "\n")
            speeds = (
                f"{format_flops(hardware.flops)}/s in attention ({name}), {format_bytes(hardware.bandwidth)}/s received"
            )
            print(f"{speeds}, {hardware.latency * 1e6:,.0f} microseconds a collective: {out}")


def _plan(
    pattern: Pattern, seq_len: int, ranks: int, layer: LayerSize, strategy: str, keep_kv: bool | None, speed: Hardware
) -> dict[str, Any]:
    """Return the costs of one layer, forward and backward, of the rank that has most of each."""
    chunk = choose_chunk(pattern, seq_len, ranks)
    shard = Shard(seq_len, chunk, 0, ranks)
    strategies = (strategy,) * len(pattern.branches)
    if strategy == "auto":
        strategies = choose_strategies(pattern, shard, layer, speed, keep_kv)
    busy = -(-seq_len // chunk)
    spans = [min(busy, -(-w // chunk)) for w in pattern.segment_lengths]
    # The first and last ranks of a segment receive and compute least and most.
    shards = [shard.of(rank) for rank in sorted({0, busy // 2, busy - 1, *(span - 1 for span in spans)})]
    received = [bytes_received(pattern, s, layer, strategies, keep_kv) for s in shards]
    flops = attention_flops(pattern, seq_len, layer.num_heads, layer.head_dim, layer.causal, layer.num_kv_heads)
    branches = [
        {
            "segment_length": branch.segment_length,
            "dilation_rate": branch.dilation_rate,
            "coverage": coverage,
            "ranks_per_segment": span,
            "strategy": name if is_shared(branch, shard) else None,
            "received_bytes": max(r[number] for r in received),
            "seconds": branch_seconds(branch, name, shard, layer, speed, keep_kv),
        }
        for number, (branch, coverage, span, name) in enumerate(
            zip(pattern.branches, pattern.coverage(layer.num_kv_heads), spans, strategies, strict=True)
        )
    ]
    return {
        "seq_len": seq_len,
        "ranks": ranks,
        "rows_per_rank": chunk,
        "last_rows": shard.of(busy - 1).num_rows,
        "idle_ranks": ranks - busy,
        "reach": pattern.reach(seq_len),
        "branches": branches,
        "received_bytes": max(map(sum, received)),
        "forward_flops": flops,
        "imbalance": max(rank_flops(pattern, s, layer, strategies) for s in shards) * busy / max(1, flops),
        "hardware": speed.name,
        "seconds": sum(branch["seconds"] for branch in branches),
        "others_received_bytes": _others(pattern, seq_len, busy, chunk, layer),
    }


def _others(pattern: Pattern, seq_len: int, ranks: int, chunk: int, layer: LayerSize) -> dict[str, float]:
    """Return what other methods send to a rank in a layer, forward and backward, by their formulas."""
    row = layer.head_dim * layer.element_size
    kv, q = 2 * layer.num_kv_heads * row, layer.num_heads * row
    kept = sum(seq_len / branch.dilation_rate for branch in pattern.branches if branch.segment_length > chunk)
    return {
        # K and V go round in the forward and the backward, and their gradients with them in the backward.
        "ring attention (dense)": 3.0 * (ranks - 1) * chunk * kv,
        # q, K, V and out are traded in the forward, and all gradients in the backward.
        "Ulysses (dense, ranks up to the heads)": 2.0 * chunk * (ranks - 1) / ranks * (2 * q + kv),
        "kept rows gathered over all ranks": 2.0 * kept * (ranks - 1) / ranks * kv,
    }


def _whole_model(
    plan: dict[str, Any], layers: int, vocab_size: int, width: int, kv_width: int, seq_len: int
) -> dict[str, Any]:
    """Return the costs of a model with a feed-forward network of four times its width, and tied embeddings."""
    matrices = layers * (2 * width * width + 2 * width * kv_width + 8 * width * width) + vocab_size * width
    attention = layers * plan["forward_flops"] * FORWARDS_PER_STEP
    return {
        "layers": layers,
        "parameters": matrices,
        "step_flops": 6 * matrices * seq_len + attention,
        "attention_share": attention / (6 * matrices * seq_len + attention),
        "step_received_bytes": layers * plan["received_bytes"],
    }


def _describe(plan: dict[str, Any]) -> str:
    chunk, busy = plan["rows_per_rank"], plan["ranks"] - plan["idle_ranks"]
    last = "" if plan["last_rows"] == chunk else f" (the last: {plan['last_rows']:,})"
    lines = [f"{plan['ranks']:,} ranks of {chunk:,} rows{last}; a token sees at most {plan['reach']:,} tokens"]
    if plan["idle_ranks"]:
        idle = f"rank {busy:,} is" if plan["idle_ranks"] == 1 else f"ranks {busy:,} to {plan['ranks'] - 1:,} are"
        lines.append(f"{idle} idle, without rows: {busy:,} ranks do as well")
    if plan["reach"] < plan["seq_len"]:
        lines.append(f"no token sees the whole sequence of {plan['seq_len']:,} tokens: give a longer segment for that")
    lines += ["", "one layer, forward and backward, on the rank that receives most:"]
    lines.append(f"{'segment':>15} {'rate':>9} {'coverage':>9} {'ranks':>6} {'strategy':>11} {'received':>11}")
    for branch in plan["branches"]:
        received = format_bytes(branch["received_bytes"]) if branch["strategy"] else "nothing"
        lines.append(
            f"{branch['segment_length']:>15,} {branch['dilation_rate']:>9,} {branch['coverage']:>9.2%} "
            f"{branch['ranks_per_segment']:>6,} {branch['strategy'] or 'local':>11} {received:>11}"
        )
    lines.append(f"{'all':>15} {format_bytes(plan['received_bytes']):>49}")
    lines.append(
        f"attention: {format_flops(plan['forward_flops'])} in the forward, all ranks together; the busiest rank has "
        f"{plan['imbalance']:.2f} x the mean"
    )
    lines.append(
        f"about {plan['seconds'] * 1e3:,.3g} ms for attention, forward and backward, on {plan['hardware']}: an estimate"
    )
    if busy > 1:
        lines.append("what a rank would receive otherwise, by formula:")
        lines += [f"  {name}: {format_bytes(count)}" for name, count in plan["others_received_bytes"].items()]
    lines += [
        "",
        f"a model of {plan['layers']:,} layers, training on one sequence:",
        f"  {plan['parameters']:,} parameters; {format_flops(plan['step_flops'])}, of which "
        f"{plan['attention_share']:.1%} in attention",
        f"  {format_bytes(plan['step_received_bytes'])} received per rank for attention",
    ]
    return "\n".join(lines)
