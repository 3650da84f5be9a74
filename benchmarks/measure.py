"""Helpers of the benchmarks: medians of contestants that take turns, peak memory, and a description of the machine."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", str, tuple[str, int])


def seconds_in_turns(
    contestants: Mapping[Name, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Measure the seconds of each contestant in each round; each should have run once before, as a warmup.

    Contestants take turns, in an order that reverses from round to round, so that a noisy machine is noisy for all.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in sorted(contestants, reverse=turn % 2 == 1):
            start = clock()
            contestants[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def median_seconds(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """Measure the median seconds of each contestant; see `seconds_in_turns`."""
    seconds = seconds_in_turns(contestants, rounds, device)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_mib(run: Callable[[], object], device: str = "cpu") -> float:
    """Measure the peak memory of one run, in MiB above what was in use before it. On a CPU, it runs once before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    run()  # Makes threads and the kernels' scratch memory, which later runs share.
    ctypes.CDLL(None).malloc_trim(0)  # Returns to the system the memory that earlier runs freed.
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 2**10


def machine(device: str = "cpu") -> str:
    """Return the version of torch and the name of the device."""
    if device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _status_kib(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
