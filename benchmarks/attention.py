"""Time and peak memory of dilated attention beside its floor, dense attention, and a peer, in one run.

    python benchmarks/attention.py [--seq-len 16384] [--rounds 7]

The floor is the best possible: the same flash kernel on blocks that are already contiguous, of the
shapes that the pattern's branches have, and nothing else: no gathering of rows, no merging.
Contestants take turns, round by round, so that a noisy machine is noisy for all; ratios are of
medians. Before any figure, the result is compared with the floor's own blocks' oracle.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from longnet_dist import Pattern, dense_reference, dilated_attention
from longnet_dist.attention.kernels import torch_flash

Contestant = Callable[[bool], None]
"""Runs once; with True also the backward."""


@dataclass
class Options:
    seq_len: int = 16384
    heads: int = 8
    head_dim: int = 64
    rounds: int = 7
    causal: bool = True
    pattern_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    pattern_rates: tuple[int, ...] = (1, 2, 4, 8)


def main(options: Options) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pattern = Pattern(options.pattern_lengths, options.pattern_rates)
    verify(device)
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"torch {torch.__version__}, {where}; {options.heads} heads of {options.head_dim}, pattern {pattern}, ", end=""
    )
    print(f"N = {options.seq_len}, {'causal' if options.causal else 'not causal'}, {options.rounds} rounds\n")
    print("| dtype | pass | contestant | median s | x floor | peak MiB above inputs | kept for backward MiB |")
    print("|---|---|---|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16, torch.float16):
        contestants = {
            "longnet_dist": ours(options, pattern, dtype, device),
            "floor": floor(options, pattern, dtype, device),
            "dense": dense(options, dtype, device),
        }
        peer = dilated_attention_pytorch(options, pattern, dtype, device)
        if not isinstance(peer, str):
            contestants["dilated-attention-pytorch"] = peer
        for backward in (False, True):
            table(contestants, dtype, backward, options.rounds, device)
    if isinstance(peer, str):
        print(f"\ndilated-attention-pytorch: {peer}")


def table(contestants: dict[str, Contestant], dtype: torch.dtype, backward: bool, rounds: int, device: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = {
        name: peak_mib(lambda run=run: run(backward), device) for name, run in contestants.items()
    }  # Warms up too.
    for turn in range(rounds):
        for name in sorted(contestants, reverse=turn % 2 == 1):
            began = time.perf_counter()
            contestants[name](backward)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["floor"])
    for name, measured in seconds.items():
        kept = f"{kept_mib(contestants[name]):.0f}" if backward and name == "longnet_dist" else ""
        median = statistics.median(measured)
        label = "forward + backward" if backward else "forward"
        row = f"| {dtype} | {label} | {name} | {median:.3f} | {median / base:.2f} | {peaks[name]:.0f} | {kept} |"
        print(row.replace("torch.", ""), flush=True)


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
    """The branches' blocks, each contiguous: (segments x phases, kept rows, heads of a phase, D)."""
    blocks = []
    for branch in pattern.branches:
        w, r = min(branch.segment_length, options.seq_len), branch.dilation_rate
        phases = min(r, options.heads)  # Of a rate above the number of heads, the other phases have no head.
        shape = (options.seq_len // w * phases, w // r, options.heads // phases, options.head_dim)
        blocks.append([torch.randn(shape, dtype=dtype, device=device) for _ in range(4)])
    given = {"causal": options.causal, "scale": 1 / math.sqrt(options.head_dim)}

    def run(backward: bool) -> None:
        for q, k, v, dout in blocks:
            out, lse = torch_flash.forward(q, k, v, **given)
            if backward:
                torch_flash.backward(dout, q, k, v, out, lse, **given)

    return run


def dense(options: Options, dtype: torch.dtype, device: str) -> Contestant:
    """torch's own attention over the whole sequence."""
    shape = (1, options.heads, options.seq_len, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=options.causal)
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return run


def dilated_attention_pytorch(options: Options, pattern: Pattern, dtype: torch.dtype, device: str) -> Contestant | str:
    """fkodom's package, or why it is not here. It gives each branch its own heads, so it does less work."""
    try:
        package = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    except ImportError as error:
        return f"not measured: it does not import here ({error}); it needs xformers < 0.0.22, which needs torch 2.0"
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
    """No figure on a wrong answer."""
    pattern = Pattern((64, 128, 256), (1, 2, 4))
    q, k, v = torch.randn(3, 1, 512, 8, 64, dtype=torch.float64, device=device).unbind()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = dilated_attention(q.to(dtype), k.to(dtype), v.to(dtype), pattern, causal=True)
    expected = dense_reference(q, k, v, pattern, causal=True)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


def peak_mib(run: Callable[[], None], device: str) -> float:
    """The most memory held at once, above what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    run()  # Threads' stacks and the kernels' scratch memory are not this call's.
    ctypes.CDLL(None).malloc_trim(0)  # Nor is what earlier calls freed and the allocator kept.
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def kept_mib(run: Contestant) -> float:
    """What autograd keeps between forward and backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(True)
    return sum(kept.values()) / 2**20


if __name__ == "__main__":
    main(tyro.cli(Options))
