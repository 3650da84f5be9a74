"""What a step cost: tokens and operations a second, memory, bytes from other ranks, the wait for data."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from longnet_dist.models.decoder import LongNet
from longnet_dist.plan.cost import attention_flops, bytes_received
from longnet_dist.plan.shard import Shard
from longnet_dist.training.config import TrainConfig


@dataclass
class StepCost:
    """Seconds of a step, and of them those that went by reading data."""

    seconds: float = 0.0
    data_seconds: float = 0.0


def measures(
    config: TrainConfig, step: int, cost: StepCost, step_flops: float, step_bytes: int, num_ranks: int
) -> dict[str, float]:
    """The figures of a step for its metrics; MFU only where the peak of a device was given."""
    tokens = config.batch_size * config.grad_accumulation * config.seq_len
    flops = step_flops / cost.seconds / num_ranks
    measured = {
        "tokens": step * tokens,
        "tokens_per_second": tokens / cost.seconds,
        "seconds": cost.seconds,
        "data_seconds": cost.data_seconds,
        "tflops_per_rank": flops / 1e12,
        "attention_bytes_received": step_bytes,
        "peak_memory_bytes": peak_memory(),
    }
    return measured | ({"mfu": flops / 1e12 / config.peak_tflops} if config.peak_tflops else {})


def step_flops(config: TrainConfig, model: LongNet) -> float:
    """Floating point operations of the model in a step, over all ranks; what is computed again does not count.

    6 a parameter and token (an embedding that is only looked up in is none), and 3.5 forwards of attention.
    """
    matrices = sum(p.numel() for p in model.parameters())
    if not config.model.tie_embeddings:
        matrices -= model.embedding.weight.numel()
    heads = config.model.num_heads
    attention = attention_flops(
        config.model.pattern, config.seq_len, heads, config.model.d_model // heads, True, config.model.num_kv_heads
    )
    sequences = config.batch_size * config.grad_accumulation
    return sequences * (6.0 * matrices * config.seq_len + 3.5 * attention * config.model.num_layers)


def step_bytes(config: TrainConfig, shard: Shard, data_ranks: int) -> int:
    """Bytes that this rank receives in a step for attention, by the plan; see `bytes_received`."""
    model = config.model
    size = 2 if config.autocast else getattr(torch, config.dtype).itemsize
    layer = bytes_received(
        model.pattern,
        shard,
        model.num_kv_heads or model.num_heads,
        model.d_model // model.num_heads,
        size,
        config.keep_kv,
    )
    return sum(layer) * model.num_layers * config.grad_accumulation * config.batch_size // data_ranks


def peak_memory() -> int:
    """The most bytes that this process held so far: on the GPU, where there is one, else in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
