"""Streams of any length, read part by part in constant memory, and resumed after a kill."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.generation import READ_AT_ONCE
from longnet_dist.models.loss import linear_token_losses


class Tokens(Protocol):
    """Tokens that can be read from any place."""

    def __len__(self) -> int: ...

    def read(self, first: int, end: int) -> np.ndarray:
        """Return the tokens [first, end)."""


class FileBytes:
    """The bytes of a file as tokens; only what is read is in memory.

    Raises:
        ValueError: for a file of fewer than 2 bytes, of which none is predicted.
    """

    def __init__(self, file: Path) -> None:
        if file.stat().st_size < 2:
            raise ValueError(f"{file} has {file.stat().st_size} tokens; the first is not predicted, so it needs 2")
        self._bytes = np.memmap(file, np.uint8, "r")

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, first: int, end: int) -> np.ndarray:
        """See `Tokens`."""
        return np.asarray(self._bytes[first:end], np.int64)


class Repeated:
    """Tokens that are repeated up to a length.

    Args:
        tokens: the tokens to repeat, one-dimensional.
        length: the number of tokens in all.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, end: int) -> np.ndarray:
        """See `Tokens`."""
        return np.take(self._tokens, np.arange(first, end), mode="wrap").astype(np.int64)


class Progress:
    """Prints now and then how much was read, how fast, and how long the rest will take.

    Args:
        total: the number of tokens.
        every: seconds between two lines.
    """

    def __init__(self, total: int, every: float = 10.0) -> None:
        self._total, self._every, self._done = total, every, 0
        self._first: tuple[float, int] | None = None
        self._printed = time.monotonic()

    @property
    def speed(self) -> float:
        """Tokens a second since the first call, which may tell of those that an earlier run has read."""
        if self._first is None:
            return 0.0
        began, before = self._first
        return (self._done - before) / max(1e-9, time.monotonic() - began)

    def __call__(self, tokens: int) -> None:
        """Count tokens that were read."""
        self._done += tokens
        now = time.monotonic()
        self._first = self._first or (now, self._done)
        if now - self._printed >= self._every and self.speed > 0:
            self._printed, speed = now, self.speed
            left = (self._total - self._done) / speed
            print(
                f"read {self._done:,} of {self._total:,} tokens ({self._done / self._total:.1%}), {speed:,.0f} a "
                f"second; {left / 60:,.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )


def can_stream(model: LongNet) -> bool:
    """Return whether a model can read a sequence part by part."""
    return model.config.position != "xpos" and model.config.padding == "none"


@torch.no_grad()
def nats_by_position(
    model: LongNet,
    tokens: Tokens,
    edges: Sequence[int] = (),
    *,
    state: Path | None = None,
    identity: str = "",
    save_every: float = 60.0,
    group: ProcessGroup | None = None,
    part: int = READ_AT_ONCE,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[int, int, float]]:
    """Return the negative log-likelihood of all tokens but the first, in memory that does not depend on their number.

    Args:
        model: the model, in eval mode.
        tokens: one sequence.
        edges: positions at which one range ends and the next begins, in increasing order; others are dropped.
        state: a file in which the state is saved now and then, and from which the call goes on if it exists. It is
            removed at the end.
        identity: what the state belongs to, such as the names of the model and the file.
        save_every: seconds between two savings.
        group: ranks that read each part together; the call is then collective. Rank 0 writes the state, and all read
            it.
        part: the number of tokens that are read at once; over ranks, see `dilated_attention` about a cache and a mesh.
        progress: called with the number of tokens that were read, after each part and for what the state had read.

    Returns:
        (first, last, nats) of each range of positions [first, last): the sum over the tokens that are predicted from
        as many tokens; the same on every rank.

    Raises:
        ValueError: if the state is that of another model or sequence.
    """
    count, device = len(tokens) - 1, model.output.weight.device
    inner = [edge for edge in edges if 0 < edge < count]
    sums = torch.zeros(len(inner) + 1, dtype=torch.float64)
    caches, read = model.new_cache(), 0
    if state is not None:
        weights = sum(p.detach().double().sum().item() for p in model.parameters())
        identity = f"{identity}; {count + 1} tokens; edges {inner}; {model.config} with weights of sum {weights!r}"
        if state.exists():
            read = _load(state, identity, caches, sums)
    if progress is not None and read:
        progress(read)
    meshes: dict[int, SequenceMesh] = {}
    saved = time.monotonic()
    while read < count:
        size = min(part, count - read)
        ids = torch.from_numpy(tokens.read(read, read + size + 1)).to(device)
        if group is not None and size not in meshes:
            meshes[size] = SequenceMesh(group, model.config.pattern, size)
        mesh = meshes.get(size)
        first, end = (0, size) if mesh is None else (mesh.shard.start, mesh.shard.stop)
        features = model.features(ids[None, first:end], mesh, cache=caches)
        nats = linear_token_losses(features, model.output.weight, ids[None, first + 1 : end + 1])[0].double()
        positions = torch.arange(read + first, read + end, device=device)
        ranges = torch.bucketize(positions, torch.tensor(inner, dtype=torch.int64, device=device), right=True)
        of_part = torch.zeros(len(sums), dtype=torch.float64, device=device).index_add_(0, ranges, nats)
        sums += (of_part if mesh is None else mesh.sum(of_part)).cpu()
        read += size
        if progress is not None:
            progress(size)
        if state is not None and time.monotonic() - saved > save_every and (mesh is None or mesh.rank == 0):
            _save(state, {"identity": identity, "read": read, "sums": sums, "caches": [c.state_dict() for c in caches]})
            saved = time.monotonic()
    if state is not None and (group is None or group.rank() == 0):
        state.unlink(missing_ok=True)
    return list(zip([0, *inner], [*inner, count], sums.tolist(), strict=True))


def _save(file: Path, state: dict[str, Any]) -> None:
    """Write a state whole: a kill leaves the one before, or this one."""
    new = file.with_name(f"{file.name}.new")
    with new.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)


def _load(file: Path, identity: str, caches: Sequence[Any], sums: Tensor) -> int:
    """Restore caches and sums, and return the number of tokens that were read."""
    state = torch.load(file, weights_only=True)
    if state["identity"] != identity:
        raise ValueError(f"{file} is the state of {state['identity']}, not of {identity}: remove it, or give another")
    for cache, saved in zip(caches, state["caches"], strict=True):
        cache.load_state_dict(saved)
    sums.copy_(state["sums"])
    return int(state["read"])
