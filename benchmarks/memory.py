"""Peak memory a token of a training step, forward and backward, by what is kept for the backward.

    python benchmarks/memory.py

Each setting runs in a process of its own at two lengths; the difference of their peaks (resident memory), over the
difference of their lengths, is the memory a token: parameters and the interpreter drop out of it. What offloading would
move to the CPU is counted as the model saves it; on a GPU that much is not there between forward and backward.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import torch

from longnet_dist import LongNetConfig, next_token_labels, token_loss

# Freed memory goes back to the system at once, or the peak would be that of a heap with holes.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LENGTHS = (8192, 16384)
VOCABULARIES = (32768,)
SETTINGS = [("none", "whole"), ("none", "in parts"), ("selective", "in parts"), ("full", "in parts")]
MODEL = {"d_model": 256, "num_layers": 6, "num_heads": 8, "segment_lengths": (1024, 4096), "dilation_rates": (1, 4)}


def step(kind: str, loss: str, vocabulary: int, length: int) -> None:
    """One step; prints the peak, in bytes."""
    torch.set_num_threads(1)
    model = LongNetConfig(**MODEL, vocab_size=vocabulary, activation_checkpointing=kind).build()
    tokens = torch.randint(vocabulary, (1, length))
    labels = next_token_labels(tokens)
    value = token_loss(model(tokens), labels) if loss == "whole" else model(tokens, labels=labels)
    value.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def offloaded(kind: str, length: int) -> float:
    """KiB a token that `offload_activations` moves: all that the blocks save, parameters aside."""
    model = LongNetConfig(**MODEL, activation_checkpointing=kind).build()
    moved = 0

    def count(x: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        moved += 0 if isinstance(x, torch.nn.Parameter) else x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.features(torch.randint(257, (1, length)))
    return moved / length / 1024


def main() -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, float32, {MODEL}; KiB a token\n")
    head = " | ".join(f"vocabulary {v}" for v in VOCABULARIES)
    print(f"| activation checkpointing | logits | {head} |\n|---|---|" + "---|" * len(VOCABULARIES))
    for setting in SETTINGS:
        cells = []
        for vocabulary in VOCABULARIES:
            command = [sys.executable, __file__, *setting, str(vocabulary)]
            short, long = (int(subprocess.check_output([*command, str(length)], env=ENVIRONMENT)) for length in LENGTHS)
            cells.append(f"{(long - short) / (LENGTHS[1] - LENGTHS[0]) / 1024:.1f}")
        print("| " + " | ".join([*setting, *cells]) + " |", flush=True)
    print("\n| activation checkpointing | moved to the CPU by offloading |\n|---|---|")
    for kind in ("none", "selective", "full"):
        print(f"| {kind} | {offloaded(kind, LENGTHS[0]):.1f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
