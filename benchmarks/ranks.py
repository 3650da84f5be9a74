"""Compare two ranks of one thread each with one process of two threads, on the same sequence, in one run.

    python benchmarks/ranks.py [--seq-len 16384] [--rounds 7]
    python benchmarks/ranks.py --balance --ranks 8 --segment-lengths 16384 --dilation-rates 4

All processes are started once and take turns. A process that waits for its turn uses no CPU. With `--balance`, the
second table has the CPU time of the ranks by strategy, which does not depend on how many of them share a core.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import tyro
from measure import dtype_name, median_seconds

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.plan.exchange import STRATEGIES


@dataclass
class Options:
    """The sizes to measure."""

    seq_len: int = 16384
    """Tokens, N."""
    heads: int = 8
    """Query heads, and as many key/value heads."""
    head_dim: int = 64
    """Dimensions per head."""
    rounds: int = 7
    """Measured runs of each side."""
    causal: bool = True
    """Whether a query sees only keys at or before it."""
    ranks: int = 2
    """Number of ranks, and of threads of the single process."""
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Segment length of each branch, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8)
    """Dilation rate of each branch."""
    balance: bool = False
    """Compare the ranks' own CPU time by strategy, instead of their speed with that of one process."""

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.segment_lengths, self.dilation_rates)


def serve(rank: int, ranks: int, threads: int, store: str, pipe: Connection, options: Options) -> None:
    """Run forward and backward for each (dtype, strategy) from the pipe, until it delivers None; send the CPU time."""
    torch.set_num_threads(threads)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    while (call := pipe.recv()) is not None:
        dtype, strategy = call
        mesh = SequenceMesh(group, options.pattern, options.seq_len, strategy=strategy)
        shape = (1, mesh.shard.num_rows, options.heads, options.head_dim)
        q, k, v, dout = (torch.randn(shape, dtype=dtype).requires_grad_(i < 3) for i in range(4))
        began = time.thread_time()
        out = dilated_attention(q, k, v, options.pattern, causal=options.causal, mesh=mesh)
        torch.autograd.grad(out, (q, k, v), dout)
        pipe.send(time.thread_time() - began)


def start_processes(ranks: int, threads: int, store: str, options: Options) -> list[Connection]:
    """Start one process per rank, and return a pipe to each."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(rank, ranks, threads, store, theirs, options), daemon=True).start()
        pipes.append(ours)
    return pipes


def run_once(pipes: list[Connection], dtype: torch.dtype, strategy: str = "auto") -> list[float]:
    """Let all processes of one side run at once, and return the CPU time of each."""
    for pipe in pipes:
        pipe.send((dtype, strategy))
    return [pipe.recv() for pipe in pipes]


def compare_balance(pipes: list[Connection], options: Options) -> None:
    """Print the CPU time of the slowest rank and of the mean, by strategy."""
    print("| strategy | slowest rank, CPU s | mean, CPU s | slowest over mean |")
    print("|---|---:|---:|---:|")
    for strategy in STRATEGIES:
        run_once(pipes, torch.float32, strategy)
        rounds = [run_once(pipes, torch.float32, strategy) for _ in range(options.rounds)]
        by_rank = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
        slowest, mean = max(by_rank), statistics.mean(by_rank)
        print(f"| {strategy} | {slowest:.3f} | {mean:.3f} | {slowest / mean:.2f} |", flush=True)


def main(options: Options) -> None:
    store = f"{tempfile.mkdtemp()}/store"
    sides = {"ranks": start_processes(options.ranks, 1, store, options)}
    print(f"torch {torch.__version__}, N = {options.seq_len}, pattern {options.pattern}, ", end="")
    print(f"forward + backward, {options.rounds} rounds\n")
    if options.balance:
        compare_balance(sides["ranks"], options)
    else:
        sides["process"] = start_processes(1, options.ranks, store, options)
        compare_speed(sides, options)
    for pipes in sides.values():
        for pipe in pipes:
            pipe.send(None)


def compare_speed(sides: dict[str, list[Connection]], options: Options) -> None:
    """Print the time of the ranks beside that of one process."""
    print(f"| dtype | one process, {options.ranks} threads, s | {options.ranks} ranks, one each, s | speed of ranks |")
    print("|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        runs = {name: partial(run_once, pipes, dtype) for name, pipes in sides.items()}
        for warm_up in runs.values():
            warm_up()
        medians = median_seconds(runs, options.rounds)
        process, ranks = medians["process"], medians["ranks"]
        print(f"| {dtype_name(dtype)} | {process:.3f} | {ranks:.3f} | {process / ranks:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
