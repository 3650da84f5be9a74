"""Measure the peak memory per token of a training step, for each kind of activation checkpointing.

    python benchmarks/memory.py

Each setting runs in a process of its own, at two lengths. The difference of the two peaks (resident memory), divided by
the difference of the lengths, is the memory per token; parameters and the interpreter cancel out.

Offloading does nothing on a CPU, so the tensors that it would move are counted when the model saves them. On a GPU, its
memory between forward and backward would be smaller by that much.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import torch

from longnet_dist import LongNetConfig, next_token_labels, token_loss

# Return freed memory to the system at once. Otherwise the peak would include holes in the heap.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LENGTHS = (8192, 16384)
VOCABULARY = 32768
SETTINGS = [("none", "whole"), ("none", "in parts"), ("selective", "in parts"), ("full", "in parts")]
MODEL = {"d_model": 256, "num_layers": 6, "num_heads": 8, "segment_lengths": (1024, 4096), "dilation_rates": (1, 4)}


def step(checkpointing: str, logits: str, length: int) -> None:
    """Run one step, and print the peak resident memory in bytes."""
    torch.set_num_threads(1)
    model = LongNetConfig(**MODEL, vocab_size=VOCABULARY, activation_checkpointing=checkpointing).build()
    tokens = torch.randint(VOCABULARY, (1, length))
    targets = next_token_labels(tokens)
    loss = token_loss(model(tokens), targets) if logits == "whole" else model(tokens, targets=targets)
    loss.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def kib_per_token(checkpointing: str, logits: str) -> float:
    """Measure the peak memory per token in processes of their own."""
    command = [sys.executable, __file__, checkpointing, logits]
    short, long = (int(subprocess.check_output([*command, str(length)], env=ENVIRONMENT)) for length in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0]) / 1024


def offloaded_kib_per_token(checkpointing: str) -> float:
    """Count the tensors that `offload_activations` would move: all that the blocks save, except parameters."""
    model = LongNetConfig(**MODEL, activation_checkpointing=checkpointing).build()
    total = 0

    def count(x: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += 0 if isinstance(x, torch.nn.Parameter) else x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.features(torch.randint(257, (1, LENGTHS[0])))
    return total / LENGTHS[0] / 1024


def main() -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, float32, {MODEL}; KiB per token\n")
    print(f"| activation checkpointing | logits | vocabulary {VOCABULARY} |\n|---|---|---:|")
    for checkpointing, logits in SETTINGS:
        print(f"| {checkpointing} | {logits} | {kib_per_token(checkpointing, logits):.1f} |", flush=True)
    print("\n| activation checkpointing | moved to the CPU by offloading |\n|---|---:|")
    for checkpointing in ("none", "selective", "full"):
        print(f"| {checkpointing} | {offloaded_kib_per_token(checkpointing):.1f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
