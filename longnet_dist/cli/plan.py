"""`longnet-dist plan`: the cost of a model over many ranks, computed from integers alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longnet_dist.cli.draw import ENDINGS
from longnet_dist.cli.options import Count, check_ending, check_positive, parse_count
from longnet_dist.paths import write_whole
from longnet_dist.plan.cost import LayerSize, choose_strategies, model_branch, saved_bytes
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.propose import Proposal, propose_patterns
from longnet_dist.plan.report import report_layer, report_model
from longnet_dist.plan.shard import Shard, choose_chunk
from longnet_dist.units import format_bytes, format_flops


def run_plan(
    pattern: str | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    dilation_rates: tuple[int, ...] | None = None,
    geometric: tuple[int, int] = (1024, 4),
    seq_len: Count = 32768,
    ranks: Count = 4,
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
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    plot: Path | None = None,
    propose: bool = False,
    max_flops: float | None = None,
    max_received: Count | None = None,
) -> None:
    """Print what a model costs over many ranks: rows, bytes, operations, memory and time, by branch and in all.

    Args:
        pattern: Branches as LENGTH:RATE,LENGTH:RATE, for example 2048:1,8192:4; another way to give --segment-lengths
            and --dilation-rates.
        segment_lengths: Segment length of each branch, in tokens; by default those of --geometric.
        dilation_rates: Dilation rate of each branch.
        geometric: Shortest segment length, and the factor by which lengths and rates grow, up to --seq-len.
        seq_len: Number of tokens of the whole sequence, as 65536, 1e9, 2^30, or 64K, 1M and 1G, which are multiples of
            1024.
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
        plot: File to draw weak and strong scaling into, a picture: .png, .svg or .pdf. It shows modelled time, bytes
            and memory of a layer's attention, per rank, from 8K to 1G tokens.
        propose: Propose up to five geometric patterns within --max-flops and --max-received that are aligned with the
            ranks, ordered by operations: first the one with which queries see most keys.
        max_flops: Most operations of a layer's forward, all ranks together, of a proposal; by default those of the
            given pattern.
        max_received: Most bytes that a rank receives in a layer, forward and backward, of a proposal; by default those
            of the given pattern.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"seq-len": seq_len, "ranks": ranks, "heads": heads, "head-dim": head_dim, "element-size": element_size}
    check_positive(sizes | {"kv-heads": kv_heads, "layers": layers, "vocab-size": vocab_size})
    if heads % kv_heads:
        raise ValueError(f"--kv-heads is {kv_heads}; it must divide --heads {heads}")
    if plot is not None:
        check_ending(plot, ENDINGS)
    pattern_of = _read_pattern(pattern, segment_lengths, dilation_rates, geometric)
    layer, speed = LayerSize(heads, kv_heads, head_dim, element_size, causal), Hardware.read(hardware)
    plan = report_layer(pattern_of(seq_len), seq_len, ranks, layer, speed, strategy, keep_kv)
    plan |= report_model(plan, layer, layers, vocab_size, speed)
    proposals: list[Proposal] = []
    if propose:
        most_flops = plan["forward_flops"] if max_flops is None else max_flops
        most_received = plan["received_bytes"] if max_received is None else max_received
        proposals = propose_patterns(seq_len, ranks, layer, speed, most_flops, most_received)
        plan["proposals"] = [dataclasses.asdict(p) | {"pattern": _spell(p.pattern)} for p in proposals]
    elif max_flops is not None or max_received is not None:
        raise ValueError("--max-flops and --max-received are budgets of --propose: give it too, or leave them out")
    print(json.dumps(plan, indent=2) if as_json else _describe(plan))
    if propose and not as_json:
        print(_describe_proposals(proposals))
    if plot is not None:
        _draw_scaling(plot, pattern_of, plan, layer, speed, strategy, keep_kv)
        if not as_json:
            print(f"\n{plot}")


def _read_pattern(
    pattern: str | None,
    segment_lengths: tuple[int, ...] | None,
    dilation_rates: tuple[int, ...] | None,
    geometric: tuple[int, int],
) -> Callable[[int], Pattern]:
    """Return the pattern for each length, from the options that give it."""
    if (segment_lengths is None) != (dilation_rates is None):
        raise ValueError("--segment-lengths and --dilation-rates go together: give both, or neither")
    if pattern is not None:
        if segment_lengths is not None:
            raise ValueError("--pattern gives segment lengths and rates: leave out --segment-lengths, or --pattern")
        branches = [branch.split(":") for branch in pattern.split(",")]
        if any(len(branch) != 2 for branch in branches):
            raise ValueError(f"--pattern is {pattern!r}; write LENGTH:RATE for each branch, as 2048:1,8192:4")
        segment_lengths, dilation_rates = zip(*(tuple(map(parse_count, branch)) for branch in branches), strict=True)
    if segment_lengths is None or dilation_rates is None:
        return lambda seq_len: Pattern.geometric(seq_len, *geometric)
    fixed = Pattern(segment_lengths, dilation_rates)
    return lambda seq_len: fixed


def _spell(pattern: Pattern) -> str:
    return ",".join(f"{branch.segment_length}:{branch.dilation_rate}" for branch in pattern.branches)


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


def _describe(plan: dict[str, Any]) -> str:
    chunk, busy = plan["rows_per_rank"], plan["ranks"] - plan["idle_ranks"]
    last = "" if plan["last_rows"] == chunk else f" (the last: {plan['last_rows']:,})"
    lines = [f"{plan['ranks']:,} ranks of {chunk:,} rows{last}; a token sees at most {plan['reach']:,} tokens"]
    if plan["idle_ranks"]:
        idle = f"rank {busy:,} is" if plan["idle_ranks"] == 1 else f"ranks {busy:,} to {plan['ranks'] - 1:,} are"
        lines.append(f"{idle} idle, without rows: {busy:,} ranks do as well")
    if plan["reach"] < plan["seq_len"]:
        lines.append(f"no token sees the whole sequence of {plan['seq_len']:,} tokens: give a longer segment for that")
    lines += ["", "one layer, forward and backward, on the rank that has most of each; operations of all forwards:"]
    lines.append(
        f"{'segment':>13} {'rate':>9} {'coverage':>8} {'peers':>6} {'strategy':>10} {'received':>10} {'sent':>10} "
        f"{'FLOP':>12} {'max/mean':>8} {'retained':>10} {'ms':>8}"
    )
    for branch in plan["branches"]:
        start = (
            f"{branch['segment_length']:>13,} {branch['dilation_rate']:>9,} {branch['coverage']:>8.2%} "
            f"{branch['peers']:>6,} {branch['strategy'] or 'local':>10}"
        )
        lines.append(_row(start, branch))
    lines += [
        _row(f"{'all':>13}{'':37}", plan),
        f"attention: {format_flops(plan['forward_flops'])} in the forward, all ranks together; the busiest rank has "
        f"{plan['imbalance']:.2f} x the mean",
        f"memory: q, k, v, out and lse take {format_bytes(plan['saved_bytes'])}, what exchanges retain "
        f"{format_bytes(plan['retained_bytes'])}, and their buffers at most {format_bytes(plan['buffer_bytes'])} for a "
        "short time",
        f"an estimate for {plan['hardware']}: {plan['seconds'] * 1e3:,.3g} ms for attention, forward and backward",
    ]
    if busy > 1:
        lines.append("what a rank would receive otherwise, by formula, and the time on as many ranks:")
        lines += [
            f"  {name}: {format_bytes(other['received_bytes'])}, {other['seconds'] * 1e3:,.3g} ms"
            for name, other in plan["others"].items()
        ]
    lines += [
        "",
        f"a model of {plan['layers']:,} layers, training on one sequence:",
        f"  {plan['parameters']:,} parameters; {format_flops(plan['step_flops'])}, of which "
        f"{plan['attention_share']:.1%} in attention; about {plan['step_seconds']:,.3g} s a step",
        f"  {format_bytes(plan['step_received_bytes'])} received and {format_bytes(plan['step_sent_bytes'])} sent per "
        f"rank for attention, which keeps {format_bytes(plan['activation_bytes'])} per rank for the backward",
    ]
    return "\n".join(lines)


def _row(start: str, costs: dict[str, Any]) -> str:
    received, sent, retained = (
        format_bytes(costs[f"{name}_bytes"]) if costs[f"{name}_bytes"] else "nothing"
        for name in ("received", "sent", "retained")
    )
    return (
        f"{start} {received:>10} {sent:>10} {format_flops(costs['forward_flops']):>12} {costs['imbalance']:>8.2f} "
        f"{retained:>10} {costs['seconds'] * 1e3:>8,.3g}"
    )


def _describe_proposals(proposals: list[Proposal]) -> str:
    if not proposals:
        return (
            "\nno geometric pattern that aligns with these ranks is within the budget: raise --max-flops or "
            "--max-received, or use a number of ranks that divides the sequence into powers of two"
        )
    lines = ["", "proposals for --pattern, within the budget; first the one with which queries see most keys:"]
    for proposal in proposals:
        coverage = " ".join(f"{share:.3g}" for share in proposal.coverage)
        lines += [
            f"  {_spell(proposal.pattern)}",
            f"    {format_flops(proposal.forward_flops)}, {format_bytes(proposal.received_bytes)} received, "
            f"{proposal.seconds * 1e3:,.3g} ms; coverage {coverage}",
        ]
    return "\n".join(lines)


def _draw_scaling(
    out: Path,
    pattern_of: Callable[[int], Pattern],
    plan: dict[str, Any],
    layer: LayerSize,
    speed: Hardware,
    strategy: str,
    keep_kv: bool | None,
) -> None:
    """Draw modelled time, bytes and memory of a rank against N: with fixed rows per rank, and with fixed ranks."""
    from matplotlib.figure import Figure

    def costs(seq_len: int, ranks: int) -> tuple[float, float, float]:
        pattern = pattern_of(seq_len)
        shard = Shard(seq_len, choose_chunk(pattern, seq_len, ranks), 0, ranks)
        names = (strategy,) * len(pattern.branches)
        if strategy == "auto":
            names = choose_strategies(pattern, shard, layer, speed, keep_kv)
        models = [
            model_branch(branch, name, shard, layer, speed, keep_kv)
            for branch, name in zip(pattern.branches, names, strict=True)
        ]
        seconds, received, retained, _ = (sum(column) for column in zip(*models, strict=True))
        return seconds * 1e3, received / 2**20, (saved_bytes(shard, layer) + retained) / 2**20

    lengths = [1 << power for power in range(13, 31)]
    rows = plan["rows_per_rank"]
    figure = Figure(figsize=(8.5, 8), layout="constrained")
    panels = figure.subplots(3, 2, sharex=True, sharey="row")
    lines = [(0, f"N / {rows:,} ranks", [max(1, -(-n // rows)) for n in lengths])]
    lines += [(1, f"{ranks:,} ranks", [ranks] * len(lengths)) for ranks in sorted({8, 64, 512, plan["ranks"]})]
    for column, label, ranks_of in lines:
        points = [costs(n, ranks) for n, ranks in zip(lengths, ranks_of, strict=True)]
        for panel, values in zip(panels[:, column], zip(*points, strict=True), strict=True):
            panel.plot(lengths, [value or float("nan") for value in values], marker=".", label=label)
    for panel in panels.flat:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel, title in zip(
        panels[0],
        (f"weak scaling: {rows:,} rows per rank", "strong scaling: a line for each number of ranks"),
        strict=True,
    ):
        panel.set_title(title, size=9)
    for panel, label in zip(panels[:, 0], ("time, ms", "received, MiB", "kept for the backward, MiB"), strict=True):
        panel.set_ylabel(label)
    for panel in panels[-1]:
        panel.set_xlabel("N, tokens")
    figure.suptitle(f"attention of one layer, forward and backward, per rank, modelled for {speed.name}", size=10)
    figure.savefig(out, dpi=100)
