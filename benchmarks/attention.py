"""Compare the time and peak memory of dilated attention with its floor, dense attention and a peer, in one run.

    OMP_NUM_THREADS=2 python benchmarks/attention.py [--seq-len 16384] [--rounds 7]

With MALLOC_MMAP_THRESHOLD_=65536 the peak memory on a CPU is that of living tensors; otherwise it includes holes of the
heap.

The floor is the least time possible: the same flash kernel on contiguous blocks with the shapes of the pattern's
branches, without gathering rows or merging results. The peer is the package dilated-attention-pytorch, if installed.
Ratios are of medians. Before anything is measured, a result is compared with the float64 oracle.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from measure import dtype_name, machine, median_seconds, peak_mib

from longnet_dist import Pattern, dense_reference, dilated_attention
from longnet_dist.attention.kernels import torch_flash

Contestant = Callable[[bool], None]
"""A function that runs the forward once, and the backward too if its argument is true."""


@dataclass
class Options:
    """The sizes to measure."""

    seq_len: int = 16384
    """Tokens, N."""
    heads: int = 8
    """Query heads, and as many key/value heads."""
    head_dim: int = 64
    """Dimensions per head."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] | None = None
    """Dtypes; by default float32 and bfloat16 on a CPU, bfloat16 and float16 on a GPU."""
    rounds: int = 7
    """Measured runs of each contestant."""
    causal: bool = True
    """Whether a query sees only keys at or before it."""
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Segment length of each branch, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8)
    """Dilation rate of each branch."""


def main(options: Options) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pattern = Pattern(options.segment_lengths, options.dilation_rates)
    verify(device)
    print(
        f"{machine(device)}; {options.heads} heads of {options.head_dim}, pattern {pattern}, N = {options.seq_len}, "
        f"{'causal' if options.causal else 'not causal'}, {options.rounds} rounds\n"
    )
    print("| dtype | pass | contestant | median s | x floor | peak MiB above inputs | saved for backward MiB |")
    print("|---|---|---|---:|---:|---:|---:|")
    peer: Contestant | str = ""
    for name in options.dtypes or (("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16")):
        dtype = getattr(torch, name)
        contestants = {
            "longnet_dist": ours(options, pattern, dtype, device),
            "floor": floor(options, pattern, dtype, device),
            "dense": dense(options, dtype, device),
        }
        peer = dilated_attention_pytorch(options, pattern, dtype, device)
        if not isinstance(peer, str):
            contestants["dilated-attention-pytorch"] = peer
        for backward in (False, True):
            print_rows(contestants, dtype, backward, options.rounds, device)
    if isinstance(peer, str):
        print(f"\ndilated-attention-pytorch: {peer}")


def print_rows(
    contestants: dict[str, Contestant], dtype: torch.dtype, backward: bool, rounds: int, device: str
) -> None:
    """Measure the contestants, and print a table's row for each."""
    runs = {name: partial(contestant, backward) for name, contestant in contestants.items()}
    peaks = {name: peak_mib(run, device) for name, run in runs.items()}  # The first runs are also the warmup.
    medians = median_seconds(runs, rounds, device)
    label = "forward + backward" if backward else "forward"
    for name, seconds in medians.items():
        saved = f"{saved_mib(contestants[name]):.0f}" if backward and name == "longnet_dist" else ""
        ratio = seconds / medians["floor"]
        cells = [dtype_name(dtype), label, name, f"{seconds:.3f}", f"{ratio:.2f}", f"{peaks[name]:.0f}", saved]
        print(f"| {' | '.join(cells)} |", flush=True)


def ours(options: Options, pattern: Pattern, dtype: torch.dtype, device: str) -> Contestant:
    shape = (1, options.seq_len, options.heads, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, dtype=dtype, device=device)

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = dilated_attention(q, k, v, pattern, causal=options.causal)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    return run


def floor(options: Options, pattern: Pattern, dtype: torch.dtype, device: str) -> Contestant:
    """Attend on the blocks of each branch, made contiguous: (segments x phases, kept rows, heads per phase, D)."""
    blocks = []
    for branch in pattern.branches:
        w, r = min(branch.segment_length, options.seq_len), branch.dilation_rate
        heads, more = divmod(options.heads, r)  # `more` phases have one head more.
        for phases, per_phase in ((more, heads + 1), (r - more, heads)):
            if phases and per_phase:
                shape = (options.seq_len // w * phases, w // r, per_phase, options.head_dim)
                blocks.append([torch.randn(shape, dtype=dtype, device=device) for _ in range(4)])
    scale = 1 / math.sqrt(options.head_dim)

    def run(backward: bool) -> None:
        for q, k, v, dout in blocks:
            out, lse = torch_flash.forward(q, k, v, causal=options.causal, scale=scale)
            if backward:
                torch_flash.backward(dout, q, k, v, out, lse, causal=options.causal, scale=scale)

    return run


def dense(options: Options, dtype: torch.dtype, device: str) -> Contestant:
    """Attend over the whole sequence, by torch's own attention."""
    shape = (1, options.heads, options.seq_len, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=options.causal)
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return run


def dilated_attention_pytorch(options: Options, pattern: Pattern, dtype: torch.dtype, device: str) -> Contestant | str:
    """Attend with fkodom's package, or return why not. It computes less: each branch has only a part of the heads."""
    try:
        package = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    except ImportError as error:
        return f"not measured, as it cannot be imported ({error}); it needs xformers < 0.0.22, which needs torch 2.0"
    layer = package.DilatedAttention(list(pattern.segment_lengths), list(pattern.dilation_rates))
    shape = (1, options.seq_len, options.heads, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = layer(q, k, v, is_causal=options.causal)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return run


def verify(device: str) -> None:
    """Compare a result with the oracle: a wrong answer is not worth measuring."""
    pattern = Pattern((64, 128, 256), (1, 2, 4))
    q, k, v = torch.randn(3, 1, 512, 8, 64, dtype=torch.float64, device=device).unbind()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = dilated_attention(q.to(dtype), k.to(dtype), v.to(dtype), pattern, causal=True)
    expected = dense_reference(q, k, v, pattern, causal=True)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


def saved_mib(run: Contestant) -> float:
    """Measure what autograd saves between forward and backward, in MiB; each storage counts once."""
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(True)
    return sum(sizes.values()) / 2**20


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
