"""Read a billion tokens on one machine: a small LongNet whose largest segment is 2^30 tokens, in constant memory.

python examples/one_billion.py --tokens 2^24                            # minutes on two cores
python examples/one_billion.py                                          # 1,073,741,824 tokens
torchrun --standalone --nproc-per-node 2 examples/one_billion.py        # two ranks read each part together

After an interruption, the same command goes on where it was.
"""

from __future__ import annotations

import math
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro

from longnet_dist import LongNetConfig, Pattern, TrainConfig
from longnet_dist.cli.options import Count
from longnet_dist.inference.stream import Progress, Reading, Repeated, nats_by_position
from longnet_dist.training.job import load_corpus

LONGEST = 1 << 30
PATTERN = Pattern.geometric(LONGEST, base=2048, growth=8)


def corpus_tokens() -> np.ndarray:
    """Return the held-out part of the default corpus, Python's standard library: bytes."""
    stream = load_corpus(TrainConfig(data=())).validation
    window = 4096
    return np.concatenate([stream.read(i, window, 0, window)[0].numpy() for i in range(stream.num_windows(window))])


def main(
    tokens: Count = LONGEST,
    file: Path | None = None,
    state: Path = Path("runs/one_billion.state"),
    part: int = 16384,
    d_model: int = 64,
    num_layers: int = 2,
) -> None:
    """Read tokens, and print the speed, the peak memory and bits per byte by position.

    Args:
        tokens: Number of tokens to read, such as 1e6 or 2^24.
        file: File whose bytes are repeated; by default the corpus is Python's standard library.
        state: File in which the state is saved every minute.
        part: Number of tokens to read at once.
        d_model: Width of the model.
        num_layers: Number of layers of the model.
    """
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    group = dist.group.WORLD if dist.is_initialized() else None
    is_first = group is None or group.rank() == 0
    torch.manual_seed(0)
    w, r = PATTERN.segment_lengths, PATTERN.dilation_rates
    config = LongNetConfig(d_model=d_model, num_layers=num_layers, segment_lengths=w, dilation_rates=r)
    model = config.build(device).eval()
    source = np.fromfile(file, np.uint8) if file is not None else corpus_tokens()
    state.parent.mkdir(parents=True, exist_ok=True)
    progress, began = Progress(tokens), time.perf_counter()
    reading = Reading(state, str(file), group=group, part=part, progress=progress if is_first else None)
    ranges = nats_by_position(model, Repeated(source, tokens), [1 << i for i in range(10, 31, 2)], reading)
    if is_first:
        seconds, cache = time.perf_counter() - began, sum(layer.num_bytes for layer in model.new_cache())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"pattern: {PATTERN}")
        print(f"{tokens:,} tokens, {progress.speed:,.0f} a second; this run took {seconds:,.0f} s")
        print(f"caches of {cache / 2**20:.1f} MiB; peak resident memory {peak / 2**20:,.0f} MiB")
        print(f"{'tokens seen':>27}  bits per byte")
        for first, last, nats in ranges:
            print(f"{first + 1:>13,} to {last:>13,}  {nats / math.log(2) / (last - first):.4f}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main)
