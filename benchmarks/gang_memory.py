"""Measure the memory of a driver, and of a gang's ranks, for each form in which a sequence of 200 MB is given.

    python benchmarks/gang_memory.py

Each form runs in a driver of its own, on a cluster of its own on this machine, with two ranks of one CPU. A small call
comes first. The driver's growth is the peak of its resident memory above that before it has the sequence; the growth of
a rank is the peak above what it held after the small call. Both include the pages of Ray's store that the process has
touched. The document of an ObjectRef is read by a task, so it is never in the driver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import ray
import torch

from longnet_dist import LongNetConfig, Pattern
from longnet_dist.integrations.ray import SequenceParallelGang

SIZE = 200_000_000
FORMS = ("value", "ObjectRef", "path")
PATTERN = Pattern((1024,), (4,))
MODEL = {"d_model": 8, "num_layers": 1, "num_heads": 1, "segment_lengths": (1024,), "dilation_rates": (4,)}


def write_inputs(folder: Path) -> None:
    """Write a model, a document of int64 ids, and q, k and v, of which q has 200 MB and the others an eighth."""
    LongNetConfig(**MODEL).build().save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    np.save(folder / "document.npy", generator.integers(0, 256, SIZE // 8))
    for name, heads in (("q", 8), ("k", 1), ("v", 1)):
        shape = (1, SIZE // (8 * 128 * 4), heads, 128)
        np.save(folder / f"{name}.npy", generator.standard_normal(shape, np.float32))


def status(name: str) -> int:
    """Return a field of this process's status in bytes: VmRSS, the resident memory, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def growth(operation: str, form: str, folder: Path) -> tuple[int, int]:
    """Return the growth of the driver, and of the rank that grows most, in bytes."""
    read = ray.remote(num_cpus=0)(np.load)
    give = {"value": np.load, "ObjectRef": read.remote if form == "ObjectRef" else None, "path": Path}[form]
    with SequenceParallelGang(2, model=folder / "model", timeout=3600) as gang:
        q = torch.zeros(1, 2048, 8, 128)
        gang.embed(b"a document " * 1000)
        gang.dilated_attention(q, q, q, PATTERN)
        before = [rank["memory_bytes"] for rank in gang.stats()["ranks"]]
        Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
        own = status("VmRSS")
        if operation == "embed":
            gang.embed(give(str(folder / "document.npy")))
        else:
            gang.dilated_attention(*(give(str(folder / f"{name}.npy")) for name in "qkv"), PATTERN, out=folder / form)
        peaks = [rank["peak_memory_bytes"] for rank in gang.stats()["ranks"]]
        return status("VmHWM") - own, max(peak - start for peak, start in zip(peaks, before, strict=True))


def main() -> None:
    """Print a table of both growths, by operation and form."""
    print("| call | given as | driver, MB | rank, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        for operation in ("embed", "dilated_attention"):
            for form in FORMS:
                command = [sys.executable, __file__, operation, form, name]
                print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        driver, rank = growth(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
        print(f"| {sys.argv[1]} | {sys.argv[2]} | {driver / 1e6:.0f} | {rank / 1e6:.0f} |")
