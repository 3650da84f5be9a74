"""The block sizes of the kernels: a few candidates, of which Triton times those that fit and keeps the fastest.

Triton stores its choices on disk (in TRITON_CACHE_DIR). The interpreter, which runs kernels on a CPU for tests, has
one candidate with small blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

SIZES = (32, 128)
"""The least and the largest number of rows that decide which candidates are timed."""
_MAX_TIMED = 4
_MAX_REGISTERS = 128
"""Of 255 registers per thread, the number that sums must not reach: then others are spilled to memory."""
_MAX_SHARED_BYTES = 200 << 10

Candidate = tuple[int, int, int, int]
"""BLOCK_I, BLOCK_J, warps, stages."""

_LOW_PRECISION: dict[str, tuple[Candidate, ...]] = {
    "forward": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 32, 4, 2)),
    "query_gradient": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "key_gradients": ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
}
_FLOAT32: dict[str, tuple[Candidate, ...]] = {
    "forward": ((64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    "query_gradient": ((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    "key_gradients": ((32, 64, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
}
_INTERPRETED: dict[str, Candidate] = {
    "forward": (32, 64, 1, 1),
    "query_gradient": (64, 32, 1, 1),
    "key_gradients": (32, 64, 1, 1),
}


def tuned(name: str) -> Callable[[Any], Any]:
    """Decorate the kernel of this name, so that its blocks are chosen when it is launched."""
    if triton.knobs.runtime.interpret:
        return triton.autotune([_config(_INTERPRETED[name])], key=[])

    def fitting(configs: list[Any], arguments: dict[str, Any], **options: Any) -> list[Any]:
        chosen = candidates(name, arguments["q"].element_size(), options["BLOCK_D"], options["SIZE"])
        return [config for config in configs if _candidate(config) in chosen]

    return triton.autotune(
        [_config(candidate) for candidate in dict.fromkeys(_LOW_PRECISION[name] + _FLOAT32[name])],
        key=["CAUSAL", "BIASED", "D", "SIZE"],
        prune_configs_by={"early_config_prune": fitting},
        cache_results=True,
    )


def candidates(name: str, itemsize: int, block_dim: int, size: int) -> list[Candidate]:
    """Return the blocks worth timing for a dtype of `itemsize` bytes, a head dim and a number of rows; at least one."""
    table = (_FLOAT32 if itemsize == 4 else _LOW_PRECISION)[name]
    fitting = [candidate for candidate in table if _fits(name, itemsize, block_dim, size, *candidate)]
    return fitting[:_MAX_TIMED] or [table[-1]]


def _fits(name: str, itemsize: int, block_dim: int, size: int, rows: int, keys: int, warps: int, stages: int) -> bool:
    own, others, sums = (keys, rows, 2) if name == "key_gradients" else (rows, keys, 1)
    registers = sums * own * block_dim // (32 * warps)
    shared = (2 * others * stages + own) * block_dim * itemsize
    return max(rows, keys) <= size and registers < _MAX_REGISTERS and shared <= _MAX_SHARED_BYTES


def _config(candidate: Candidate) -> Any:
    rows, keys, warps, stages = candidate
    return triton.Config({"BLOCK_I": rows, "BLOCK_J": keys}, num_warps=warps, num_stages=stages)


def _candidate(config: Any) -> Candidate:
    return config.kwargs["BLOCK_I"], config.kwargs["BLOCK_J"], config.num_warps, config.num_stages
