"""The cost of a step: its duration, operations, memory, and the bytes that it receives from other ranks."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from longnet_dist.best_effort import BestEffort
from longnet_dist.data.corpus import Corpus, num_files
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.encoder import LongNetEncoder
from longnet_dist.plan.cost import FORWARDS_PER_STEP, LayerSize, attention_flops, bytes_received
from longnet_dist.training.config import TrainConfig
from longnet_dist.units import format_bytes


@dataclass
class StepCost:
    """The duration of a step."""

    seconds: float = 0.0
    """Duration of the whole step."""
    data_seconds: float = 0.0
    """The part of it in which data was read."""
    exposed_seconds: float = 0.0
    """The part of it in which this rank waited for others of its sequence; see `SequenceMesh.exposed_seconds`."""


def step_metrics(
    config: TrainConfig, step: int, cost: StepCost, step_flops: float, step_bytes: int, num_ranks: int
) -> dict[str, float]:
    """Return the metrics that describe the cost of a step; MFU is among them only if the options name a peak.

    Args:
        config: the run's options.
        step: the step's number, from 1.
        cost: the step's duration.
        step_flops: floating-point operations per step, over all ranks.
        step_bytes: bytes that this rank receives for attention in a step.
        num_ranks: the number of all ranks.

    Returns:
        The values by the names that metrics.jsonl uses.
    """
    tokens = config.batch_size * config.grad_accumulation * config.seq_len
    flops = step_flops / cost.seconds / num_ranks
    metrics = {
        "tokens": step * tokens,
        "tokens_per_second": tokens / cost.seconds,
        "seconds": cost.seconds,
        "data_seconds": cost.data_seconds,
        "exposed_communication_seconds": cost.exposed_seconds,
        "tflops_per_rank": flops / 1e12,
        "attention_bytes_received": step_bytes,
        "peak_memory_bytes": peak_memory(),
    }
    return metrics | ({"mfu": flops / 1e12 / config.peak_tflops} if config.peak_tflops else {})


def step_flops(config: TrainConfig, model: LongNet | LongNetEncoder) -> float:
    """Count the model's floating-point operations in a step, over all ranks, without recomputation.

    They are 6 per parameter and token, and 3.5 times the forward of attention. An input embedding that is not also the
    output projection counts none, and of two weights for two kinds of tokens each token uses one.

    Args:
        config: the run's options.
        model: the model, before or after sharding.
    """
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".B." not in name)
    if isinstance(model, LongNet) and not config.model.tie_embeddings:
        matrices -= model.embedding.weight.numel()
    heads, causal = config.model.num_heads, isinstance(model, LongNet)
    attention = attention_flops(
        config.model.pattern, config.seq_len, heads, config.model.d_model // heads, causal, config.model.num_kv_heads
    )
    sequences = config.batch_size * config.grad_accumulation
    return sequences * (6.0 * matrices * config.seq_len + FORWARDS_PER_STEP * attention * config.model.num_layers)


def step_bytes(config: TrainConfig, mesh: SequenceMesh, data_ranks: int) -> int:
    """Count the bytes that this rank receives for attention in a step, by the plan; see `bytes_received`.

    Args:
        config: the run's options.
        mesh: the ranks of a sequence.
        data_ranks: number of data-parallel ranks.
    """
    model = config.model
    itemsize = 2 if config.autocast else getattr(torch, config.dtype).itemsize
    num_kv_heads = model.num_kv_heads or model.num_heads
    layer = LayerSize(model.num_heads, num_kv_heads, model.d_model // model.num_heads, itemsize, causal=True)
    bytes_per_layer = bytes_received(model.pattern, mesh.shard, layer, mesh.strategies(layer), config.keep_kv)
    return sum(bytes_per_layer) * model.num_layers * config.grad_accumulation * config.batch_size // data_ranks


def describe_run(
    config: TrainConfig, corpus: Corpus, mesh: SequenceMesh, parameters: int, step_bytes: int
) -> list[str]:
    """Describe what a run reads, trains and communicates, in a few lines for its start.

    Args:
        config: the run's options.
        corpus: its data.
        mesh: the ranks of a sequence.
        parameters: number of parameters of the model.
        step_bytes: bytes that a rank receives for attention in a step.
    """
    index, pattern = corpus.index, config.model.pattern
    num_bytes, documents = (sum(getattr(s, name) for s in index.shards) for name in ("num_bytes", "documents"))
    files = num_files(config.data)
    heads = config.model.num_kv_heads or config.model.num_heads
    branches = ", ".join(
        f"{branch}" + ("" if covered == 1 else f" which keeps {covered:.2%} of the tokens")
        for branch, covered in zip(pattern.branches, pattern.coverage(heads), strict=True)
    )
    reach = pattern.reach(config.seq_len)
    short = "" if reach == config.seq_len else f", although sequences have {config.seq_len:,}"
    return [
        f"data: {f'{files:,} files, ' if files else ''}{documents:,} documents, {format_bytes(num_bytes)} of text, "
        f"{index.num_tokens:,} tokens by {index.tokenizer}",
        f"model: {parameters:,} parameters; a token sees at most {reach:,} tokens{short}; branches {branches}",
        f"ranks: {mesh.size} for each sequence of {config.seq_len:,} tokens, {mesh.shard.chunk:,} rows each; a rank "
        f"receives {format_bytes(step_bytes)} a step for attention",
    ]


@contextlib.contextmanager
def write_profile(path: Path, device: torch.device) -> Iterator[None]:
    """Profile the context's body, and write the trace to a file, for Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        yield
    with BestEffort("profiler traces"):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes: GPU memory if there is a GPU, otherwise resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
