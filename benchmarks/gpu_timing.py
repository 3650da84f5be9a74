"""The sizes of `gpu.py`, its clock, and the calls that it compares."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu import one_line
from torch import Tensor
from torch.profiler import ProfilerActivity

from longnet_dist import Pattern, dilated_attention
from longnet_dist.attention.kernels import KERNELS, Kernel, KernelRequest

Run = Callable[[], object]
Emit = Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        device: "cuda" or "cpu".
        dtype: dtype of q, k and v.
        seq_len, heads, head_dim: N, H and D of one call of attention.
        base: the shortest segment length; the others are 4, 16, ... times as long.
        oracle_len: N of the comparison with the oracle, whose memory is quadratic.
        chunk: rows per rank.
        lengths: N of the parts of one rank.
        d_model, layers, train_len: width, blocks and N of the model that is trained.
        rounds: measured runs of each contestant.
        kernels: names of kernels; empty for all.
        num_gpus: number of ranks of the part with one rank per GPU.
    """

    device: str
    dtype: torch.dtype
    seq_len: int
    heads: int
    head_dim: int
    base: int
    oracle_len: int
    chunk: int
    lengths: tuple[int, ...]
    d_model: int
    layers: int
    train_len: int
    rounds: int
    kernels: tuple[str, ...]
    num_gpus: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Sizes:
        """Return the sizes of a run: on a GPU those of the published tables, and small ones for a rehearsal."""
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        num_gpus = options.gpus or (torch.cuda.device_count() if options.device == "cuda" else 0)
        common = (options.rounds, tuple(options.kernels or ()), num_gpus)
        if options.small:
            return cls(options.device, dtype, 512, 4, 16, 128, 256, 256, (256, 1024, 65536), 32, 1, 256, *common)
        lengths = tuple(1 << n for n in range(13, 31))  # 8,192 to 1,073,741,824.
        return cls(options.device, dtype, 131072, 16, 128, 2048, 2048, 16384, lengths, 2048, 4, 65536, *common)

    @property
    def pattern(self) -> Pattern:
        """The branches w = base * 4^i, r = 4^i, up to the length of the sequence."""
        return Pattern.geometric(self.seq_len, base=self.base, growth=4)

    def served(self, emit: Emit, head_dim: int | None = None) -> dict[str, Kernel]:
        """Return the kernels that serve this device; for each of the others, emit the reason why it does not."""
        served = {}
        request = KernelRequest(torch.device(self.device), self.dtype, head_dim or self.head_dim)
        for name in self.kernels or KERNELS:
            kernel = KERNELS.get(name)
            reasons = ["there is no such kernel"] if kernel is None else kernel.unsupported(request)
            if kernel is None or reasons:
                emit(kernel=name, **{"not run": ", ".join(reasons)})
            else:
                served[name] = kernel
        return served

    def inputs(self, seq_len: int = 0) -> list[Tensor]:
        """Return q, k and v, which require gradients, and a gradient of the output: (1, N, H, D) each."""
        shape = (1, seq_len or self.seq_len, self.heads, self.head_dim)
        generator = torch.Generator(self.device).manual_seed(0)
        tensors = [torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator) for _ in range(4)]
        return [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]


def measure(runs: Mapping[str, Run], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Measure contestants that take turns, in an order that reverses from round to round.

    On a GPU, events surround each run, and the host waits for none before all rounds are queued. So the time is that
    of the GPU, unless the host cannot launch as fast, which `host ms` shows.

    Returns:
        By name: the median ("ms"), both quartiles, the host's median, and the peak memory in MiB above what was in use
        before the run (None on a CPU); or "failed", with the reason.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            results[name] = {"MiB": peak_mib(run, device)}  # It is also the warmup.
        except Exception as error:
            results[name] = {"failed": one_line(error)}
    sound = {name: run for name, run in runs.items() if "failed" not in results[name]}
    spans: dict[str, list[Any]] = {name: [] for name in sound}
    for turn in range(rounds):
        for name in sorted(sound, reverse=turn % 2 == 1):
            before, began = now(device), time.perf_counter()
            sound[name]()
            host = time.perf_counter() - began
            spans[name].append((before, now(device), host))
    if device == "cuda":
        torch.cuda.synchronize()
    for name, marks in spans.items():
        times = sorted(elapsed_ms(before, after) for before, after, _ in marks)
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        host = statistics.median(host for *_, host in marks) * 1e3
        numbers = {"ms": middle, "lower quartile": low, "upper quartile": high, "host ms": host}
        results[name] = {key: round(value, 3) for key, value in numbers.items()} | results[name]
    return results


def now(device: str) -> Any:
    """Return a mark of the present: an event in the queue of the GPU, or the seconds on a CPU."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(before: Any, after: Any) -> float:
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def peak_mib(run: Run, device: str) -> int | None:
    """Run once, and return the peak memory above what was in use before; on a CPU, run alone."""
    if device == "cpu":
        run()
        return None
    run()  # Loads kernels, whose workspaces stay.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def profile(run: Run, device: str) -> dict[str, Any]:
    """Return the launches of a run, the milliseconds that they take, and the longest; on a CPU, torch's operators."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    which = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == which]
    total = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 for event in events}
    longest = sorted(events, key=lambda event: total[event.key], reverse=True)[:6]
    return {
        "launches": sum(event.count for event in events),
        "kernel_ms": round(sum(total.values()), 3),
        "longest": "; ".join(f"{event.key[:60]} x{event.count}: {total[event.key]:.2f} ms" for event in longest),
    }


def attention_run(attend: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Run:
    """Return a run of attention on q, k and v, and of its backward if asked."""
    q, k, v, dout = inputs

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    return run


def ours(sizes: Sizes, kernel: str, causal: bool, pattern: Pattern | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: dilated_attention(q, k, v, pattern or sizes.pattern, causal=causal, kernel=kernel)


def floor_run(sizes: Sizes, kernel: Kernel, causal: bool, backward: bool) -> Run:
    """Return a run of the kernel alone on the blocks of each branch: nothing is gathered, and nothing merged.

    A block is (segments x phases, kept rows, heads per phase, D), contiguous.
    """
    blocks = []
    for branch in sizes.pattern.branches:
        w, r = min(branch.segment_length, sizes.seq_len), branch.dilation_rate
        heads, more = divmod(sizes.heads, r)  # `more` phases have one head more.
        for phases, per_phase in ((more, heads + 1), (r - more, heads)):
            if phases and per_phase:
                shape = (sizes.seq_len // w * phases, w // r, per_phase, sizes.head_dim)
                blocks.append([torch.randn(shape, dtype=sizes.dtype, device=sizes.device) for _ in range(4)])
    scale = 1 / math.sqrt(sizes.head_dim)

    def run() -> None:
        for q, k, v, dout in blocks:
            out, lse = kernel.forward(q, k, v, causal=causal, scale=scale)
            if backward:
                kernel.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)

    return run


class _Attend(torch.autograd.Function):
    """A kernel on rectangles, as a function of torch's autograd; the lse has no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, causal: bool) -> tuple[Tensor, Tensor]:
        ctx.options = {"causal": causal, "scale": 1 / math.sqrt(q.shape[-1])}
        out, lse = kernel.forward(q, k, v, **ctx.options)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv, _ = ctx.kernel.backward(dout, *ctx.saved_tensors, **ctx.options)
        return dq, dk, dv, None, None


def torchscale_style(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kernel: Kernel, causal: bool) -> Tensor:
    """Compute dilated attention as torchscale publishes it: copy, attend, scatter, mix.

    For each branch the kept rows are copied out, attended in one call, and scattered into a tensor of full size, with
    an lse of -1e8 elsewhere. Then the branches are mixed by the softmax of their lse, through which no gradient goes.
    r must divide w, w must divide N, and r and H must divide one another.
    """
    outs, lses = [], []
    for branch in pattern.branches:
        w, r = min(branch.segment_length, q.shape[1]), branch.dilation_rate
        rows = [_kept(x, r) for x in (q, k, v)]
        shape = rows[0].shape
        rectangles = [x.reshape(-1, w // r, *shape[2:]) for x in rows]
        out, lse = _Attend.apply(*rectangles, kernel, causal)
        whole, whole_lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -1e8, dtype=torch.float32)
        _kept_view(whole, r).copy_(out.reshape(shape).unflatten(2, _kept_view(whole, r).shape[2:-1]))
        lse = lse.transpose(1, 2).reshape(shape[:-1])
        _kept_view(whole_lse[..., None], r).copy_(lse.unflatten(2, _kept_view(whole, r).shape[2:-1])[..., None])
        outs.append(whole)
        lses.append(whole_lse)
    weights = torch.stack(lses).softmax(0).to(q.dtype)
    total = outs[0] * weights[0, ..., None]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total = total + out * weight[..., None]
    return total


def _kept_view(x: Tensor, r: int) -> Tensor:
    """View the kept rows of all heads, (B, N, H, D) -> (B, N / r, phases, heads per phase, D).

    Head h has the phase h mod r.
    """
    B, N, H, D = x.shape
    phases = min(r, H)
    by_phase = x.view(B, N // r, r, H // phases, phases, D)
    return by_phase.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


def _kept(x: Tensor, r: int) -> Tensor:
    return _kept_view(x, r).flatten(2, 3).contiguous()
