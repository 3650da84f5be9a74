"""Measure the time and the peak memory of embedding one slide, by the published sizes and random weights.

    python benchmarks/slides.py [--num-tiles 45680] [--threads 2] [--all-layers]
    torchrun --nproc-per-node 2 benchmarks/slides.py --threads 1

The slide is written to a temporary file, and read as `longnet-dist embed-slides` reads it. Each rank prints its peak.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

from longnet_dist.inference.slides import embed_slides
from longnet_dist.models.slide_encoder import SlideEncoder


@dataclass
class Options:
    """The slide and the encoder to measure."""

    num_tiles: int = 45_680
    """Tiles of the slide."""
    num_layers: int = 12
    """Blocks of the encoder; 12 are published."""
    threads: int = 2
    """Threads of torch, of each rank."""
    padding: Literal["torchscale", "none"] = "torchscale"
    """Attention as published weights were trained, or exact."""
    all_layers: bool = False
    """Also embed by all layers."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = SlideEncoder(num_layers=options.num_layers, padding=options.padding).eval()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.npz"
        numbers = np.random.default_rng(0)
        features = numbers.standard_normal((options.num_tiles, 1536), dtype=np.float32)
        np.savez(path, features=features, coords=256 * numbers.integers(0, 1000, (options.num_tiles, 2)))
        del features
        before = peak_gib()
        start = time.perf_counter()
        failed = embed_slides(model, [path], Path(scratch), options.all_layers, dist.group.WORLD if ranks > 1 else None)
        seconds = time.perf_counter() - start
    rank = dist.get_rank() if ranks > 1 else 0
    print(
        f"rank {rank} of {ranks}, torch {torch.__version__}, {options.threads} threads: {options.num_tiles:,} tiles, "
        f"{options.num_layers} layers, padding {options.padding}: {seconds:.1f} s, peak {peak_gib():.2f} GiB "
        f"({before:.2f} GiB before){', FAILED' if failed else ''}",
        flush=True,
    )
    if ranks > 1:
        dist.destroy_process_group()
    raise SystemExit(bool(failed))


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
