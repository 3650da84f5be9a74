"""Measures how fast the ranks of a group compute attention and communicate, for the planner."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longnet_dist.attention.api import dilated_attention
from longnet_dist.distributed.collectives import Communicator, gather_objects, uses_nccl
from longnet_dist.plan.cost import FORWARDS_PER_STEP, attention_flops
from longnet_dist.plan.hardware import Hardware
from longnet_dist.plan.pattern import Pattern

_ROUNDS = 5


def calibrate(
    group: ProcessGroup | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    num_heads: int = 8,
    head_dim: int = 64,
    rows: int = 4096,
    num_bytes: int = 1 << 24,
    name: str = "measured",
) -> Hardware:
    """Measure the hardware of the ranks of a group, or of this process alone. Collective.

    Attention is timed on one segment of `rows` tokens, forward and backward, and all-gathers of one byte and of
    `num_bytes` from each rank. Each number is the median of some rounds on the slowest rank.

    Args:
        group: the ranks; None for this process alone, whose bandwidth and latency are then those of copies in memory.
        dtype: dtype of the attention.
        num_heads, head_dim: H and D.
        rows: N of the measured attention.
        num_bytes: bytes that each rank sends in the measured gather.
        name: the name of the result.

    Returns:
        The hardware, the same on every rank; for `SequenceMesh(hardware=...)` and `longnet-dist plan --hardware FILE`.
    """
    on_gpu = torch.cuda.is_available() if group is None else uses_nccl(group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    shape, pattern = (3, 1, rows, num_heads, head_dim), Pattern((rows,), (1,))
    q, k, v = (x.requires_grad_() for x in torch.randn(shape, device=device, dtype=dtype).unbind())

    def attend() -> None:
        torch.autograd.grad(dilated_attention(q, k, v, pattern, causal=True).sum(), (q, k, v))

    flops = FORWARDS_PER_STEP * attention_flops(pattern, rows, num_heads, head_dim, causal=True)
    attention = _slowest(_median_seconds(attend, device), group)
    small, large = (_slowest(_gather_seconds(count, group, device), group) for count in (1, num_bytes))
    others = 1 if group is None else max(1, dist.get_world_size(group) - 1)
    return Hardware(name, flops / attention, others * num_bytes / max(1e-9, large - small), small)


def _gather_seconds(count: int, group: ProcessGroup | None, device: torch.device) -> float:
    x = torch.zeros(count, dtype=torch.uint8, device=device)
    if group is None:
        return _median_seconds(x.clone, device)
    communicator = Communicator(group, timedelta(minutes=10), dist.get_rank(group))
    return _median_seconds(lambda: communicator.all_gather(x, "measuring the bandwidth").wait(), device)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + _ROUNDS):  # The first one is the warmup.
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _slowest(seconds: float, group: ProcessGroup | None) -> float:
    return seconds if group is None else max(gather_objects(seconds, group))
