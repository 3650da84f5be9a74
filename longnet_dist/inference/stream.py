"""Streams of any length, read part by part in constant memory, and resumed after a kill."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.generation import READ_AT_ONCE
from longnet_dist.models.loss import linear_token_losses

_REDRAWN_EVERY = 0.5
"""Seconds between two drawings of a bar on a terminal."""
_BAR = 30
"""Characters of a bar."""
_REST_OF_LINE = "\x1b[K"
"""What clears the rest of a line of a terminal."""


class Tokens(Protocol):
    """Tokens that can be read from any place."""

    def __len__(self) -> int: ...

    def read(self, first: int, end: int) -> np.ndarray:
        """Return the tokens [first, end)."""


class FileBytes:
    """The bytes of a file as tokens; only what is read is in memory.

    Args:
        file: the file.
        at_least: the fewest bytes that are of use: 2 if each is predicted from those before it.

    Raises:
        ValueError: for a file of fewer bytes.
    """

    def __init__(self, file: Path, at_least: int = 2) -> None:
        if (size := file.stat().st_size) < at_least:
            why = "; the first is not predicted, so it needs 2" if at_least == 2 else ""
            raise ValueError(f"{file} has {size} tokens{why}")
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
    """Shows on stderr how much was read, how fast, and how long the rest will take: a bar on a terminal, else lines.

    Args:
        total: the number of tokens.
        every: seconds between two lines.
    """

    def __init__(self, total: int, every: float = 10.0) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._total, self._every, self._done = total, _REDRAWN_EVERY if self._is_terminal else every, 0
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
        ends = self._is_terminal and self._done >= self._total - 1  # The last token may be left out.
        if (now - self._printed >= self._every or ends) and self.speed > 0:
            self._printed = now
            self._print(ends)

    def _print(self, ends: bool) -> None:
        speed, done = self.speed, self._done / self._total
        text = (
            f"read {self._done:,} of {self._total:,} tokens ({done:.1%}), {speed:,.0f} a second; "
            f"{(self._total - self._done) / speed / 60:,.0f} minutes left"
        )
        if self._is_terminal:
            bar = "#" * round(_BAR * min(1.0, done))
            text, end = f"\r[{bar:{_BAR}}] {text}{_REST_OF_LINE}", "\n" if ends else ""
        else:
            end = "\n"
        print(text, end=end, file=sys.stderr, flush=True)


def can_stream(model: LongNet) -> bool:
    """Return whether a model can read a sequence part by part."""
    return model.config.position != "xpos" and model.config.padding == "none"


@dataclass(frozen=True)
class Reading:
    """How a stream is read.

    Args:
        state: a file in which the state is saved now and then, and from which reading goes on if it exists. It is
            removed at the end.
        identity: what the state belongs to, such as the names of the model and the file.
        save_every: seconds between two savings.
        group: ranks that read each part together; the call is then collective. Rank 0 writes the state, and all read
            it.
        part: the number of tokens that are read at once; over ranks, see `dilated_attention` about a cache and a mesh.
        progress: called with the number of tokens that were read, after each part and for what the state had read.
    """

    state: Path | None = None
    identity: str = ""
    save_every: float = 60.0
    group: ProcessGroup | None = None
    part: int = READ_AT_ONCE
    progress: Callable[[int], object] | None = None


def nats_by_position(
    model: LongNet, tokens: Tokens, edges: Sequence[int] = (), reading: Reading = Reading()
) -> list[tuple[int, int, float]]:
    """Return the negative log-likelihood of all tokens but the first, in memory that does not depend on their number.

    Args:
        model: the model, in eval mode.
        tokens: one sequence.
        edges: positions at which one range ends and the next begins, in increasing order; others are dropped.
        reading: how it is read.

    Returns:
        (first, last, nats) of each range of positions [first, last): the sum over the tokens that are predicted from
        as many tokens; the same on every rank.

    Raises:
        ValueError: if the state is that of another model or sequence.
    """
    count = len(tokens) - 1
    inner = [edge for edge in edges if 0 < edge < count]
    bounds = torch.tensor(inner, dtype=torch.int64, device=model.output.weight.device)

    def nats(features: Tensor, following: Tensor, first: int) -> Tensor:
        of_each = linear_token_losses(features, model.output.weight, following)[0].double()
        positions = torch.arange(first, first + len(of_each), device=of_each.device)
        return of_each.new_zeros(len(inner) + 1).index_add_(0, torch.bucketize(positions, bounds, right=True), of_each)

    sums = _read(model, tokens, count, nats, len(inner) + 1, f"edges {inner}", reading)
    return list(zip([0, *inner], [*inner, count], sums.tolist(), strict=True))


def embedding_of_stream(
    model: LongNet, tokens: Tokens, pooling: Literal["mean", "last"] = "mean", reading: Reading = Reading()
) -> Tensor:
    """Return the features of a sequence as `embeddings` does, in memory that does not depend on its length.

    Args:
        model: the model, in eval mode.
        tokens: one sequence.
        pooling: "mean" for the mean over all tokens, "last" for the features of the last token.
        reading: how it is read.

    Returns:
        (d_model,), float64, the same on every rank.

    Raises:
        ValueError: if the state is that of another model or sequence, or `pooling` is unknown.
    """
    if pooling not in ("mean", "last"):
        raise ValueError(f"pooling is {pooling!r}; it must be 'mean' or 'last'")

    def pooled(features: Tensor, _: Tensor, first: int) -> Tensor:
        after = 0 if pooling == "mean" else max(0, len(tokens) - 1 - first)
        return features[0, after:].double().sum(0)

    sums = _read(model, tokens, len(tokens), pooled, model.config.d_model, f"pooling {pooling}", reading)
    return sums / (len(tokens) if pooling == "mean" else 1)


@torch.no_grad()
def _read(
    model: LongNet,
    tokens: Tokens,
    count: int,
    summand: Callable[[Tensor, Tensor, int], Tensor],
    num_sums: int,
    purpose: str,
    reading: Reading,
) -> Tensor:
    """Read the first `count` tokens, and return the sums of `summand` over all parts, (num_sums,), float64.

    Args:
        model, tokens, reading: see `nats_by_position`.
        count: the number of tokens to read.
        summand: called with features (1, L, d_model), the tokens that follow each, (1, L), of which the very last may
            be missing, and the position of the first; returns (num_sums,), float64.
        num_sums: the number of sums.
        purpose: what they are, for the identity of the state.
    """
    device, group, state = model.output.weight.device, reading.group, reading.state
    caches, read, identity = model.new_cache(), 0, ""
    sums = torch.zeros(num_sums, dtype=torch.float64)
    if state is not None:
        weights = sum(p.detach().double().sum().item() for p in model.parameters())
        identity = (
            f"{reading.identity}; {len(tokens)} tokens; {purpose}; {model.config} with weights of sum {weights!r}"
        )
        if state.exists():
            read = _load(state, identity, caches, sums)
    if reading.progress is not None and read:
        reading.progress(read)
    meshes: dict[int, SequenceMesh] = {}
    saved = time.monotonic()
    while read < count:
        size = min(reading.part, count - read)
        ids = torch.from_numpy(tokens.read(read, min(read + size + 1, len(tokens)))).to(device)
        if group is not None and size not in meshes:
            meshes[size] = SequenceMesh(group, model.config.pattern, size)
        mesh = meshes.get(size)
        first, end = (0, size) if mesh is None else (mesh.shard.start, mesh.shard.stop)
        features = model.features(ids[None, first:end], mesh, cache=caches)
        of_part = summand(features, ids[None, first + 1 : end + 1], read + first)
        sums += (of_part if mesh is None else mesh.sum(of_part)).cpu()
        read += size
        if reading.progress is not None:
            reading.progress(size)
        is_first = mesh is None or mesh.rank == 0
        if state is not None and is_first and time.monotonic() - saved > reading.save_every:
            _save(state, {"identity": identity, "read": read, "sums": sums, "caches": [c.state_dict() for c in caches]})
            saved = time.monotonic()
    if state is not None and (group is None or group.rank() == 0):
        state.unlink(missing_ok=True)
    return sums


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
