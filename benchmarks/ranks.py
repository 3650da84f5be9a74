"""Two ranks of one thread beside one process of two threads, on the same sequence, in one run.

    python benchmarks/ranks.py [--seq-len 16384] [--rounds 7]

All processes live throughout and take turns; those that wait are blocked, not spinning.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import tyro

from longnet_dist import Pattern, SequenceMesh, dilated_attention


@dataclass
class Options:
    seq_len: int = 16384
    heads: int = 8
    head_dim: int = 64
    rounds: int = 7
    causal: bool = True
    ranks: int = 2
    pattern_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    pattern_rates: tuple[int, ...] = (1, 2, 4, 8)


def work(rank: int, ranks: int, threads: int, store: str, pipe: Connection, options: Options) -> None:
    """Run forward and backward once for each dtype that is asked for."""
    torch.set_num_threads(threads)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    pattern = Pattern(options.pattern_lengths, options.pattern_rates)
    mesh = SequenceMesh(group, pattern, options.seq_len)
    while (dtype := pipe.recv()) is not None:
        shape = (1, mesh.shard.num_rows, options.heads, options.head_dim)
        q, k, v, dout = (torch.randn(shape, dtype=dtype).requires_grad_(i < 3) for i in range(4))
        out = dilated_attention(q, k, v, pattern, causal=options.causal, mesh=mesh)
        torch.autograd.grad(out, (q, k, v), dout)
        pipe.send("done")


def main(options: Options) -> None:
    context = multiprocessing.get_context("spawn")
    store = f"{tempfile.mkdtemp()}/store"
    teams: dict[str, list[Connection]] = {}
    for name, ranks, threads in (("one process", 1, options.ranks), ("ranks", options.ranks, 1)):
        teams[name] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(rank, ranks, threads, store, theirs, options), daemon=True).start()
            teams[name].append(ours)

    def turn(name: str, dtype: torch.dtype) -> float:
        began = time.perf_counter()
        for pipe in teams[name]:
            pipe.send(dtype)
        for pipe in teams[name]:
            pipe.recv()
        return time.perf_counter() - began

    pattern = Pattern(options.pattern_lengths, options.pattern_rates)
    print(f"torch {torch.__version__}, N = {options.seq_len}, pattern {pattern}, forward + backward, ", end="")
    print(f"{options.rounds} rounds\n")
    print(f"| dtype | one process, {options.ranks} threads, s | {options.ranks} ranks, one each, s | speed of ranks |")
    print("|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        for name in teams:
            turn(name, dtype)
        seconds = {name: [] for name in teams}
        for _ in range(options.rounds):
            for name in teams:
                seconds[name].append(turn(name, dtype))
        one, ranks = (statistics.median(seconds[name]) for name in teams)
        print(f"| {str(dtype).removeprefix('torch.')} | {one:.3f} | {ranks:.3f} | {one / ranks:.2f} |", flush=True)
    for pipes in teams.values():
        for pipe in pipes:
            pipe.send(None)


if __name__ == "__main__":
    main(tyro.cli(Options))
