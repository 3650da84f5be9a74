"""The collectives that a layer starts at one time. Those of one kind between the same ranks can become one.

Each collective has a latency, which outweighs the transfer where little is sent. In the buffer of a joint all-to-all,
all rows for one rank lie side by side. So packing and unpacking take one kernel for each part, however many ranks there
are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from longnet_dist.distributed.collectives import Communicator, Pending


class Part:
    """A collective, alone or as a part of a joint one. `wait` waits for its result; it is set at the start."""

    wait: Callable[[], Tensor]

    def __init__(self, x: Tensor, what: str, sent: tuple[int, ...] = (), received: tuple[int, ...] = ()) -> None:
        self.x, self.what, self.sent, self.received = x, what, sent, received


class Batch:
    """Collectives that start at once or, if they are shared, at `launch`. Its methods are those of `Communicator`.

    The ranks of a communicator must make the same calls of it in the same order.

    Args:
        shared: whether collectives of one kind, communicator and dtype become one.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._waiting: dict[tuple[object, ...], _Joint] = {}

    def all_gather(self, communicator: Communicator, x: Tensor, what: str) -> Part:
        """Gather x from every rank: (n, ...) -> (P, n, ...)."""
        return self._add(_all_gather, communicator, Part(x, what))

    def reduce_scatter(self, communicator: Communicator, x: Tensor, what: str) -> Part:
        """Sum x over the ranks, and keep this rank's part: (P, n, ...) -> (n, ...)."""
        return self._add(_reduce_scatter, communicator, Part(x, what))

    def all_to_all(
        self, communicator: Communicator, x: Tensor, sent: list[int], received: list[int], what: str
    ) -> Part:
        """Send each rank its rows of x: (sum(sent), ..., B, D) -> (sum(received), ..., B, D)."""
        return self._add(_all_to_all, communicator, Part(x, what, tuple(sent), tuple(received)), *x.shape[-2:])

    def launch(self) -> None:
        """Start what waits."""
        waiting, self._waiting = self._waiting, {}
        for joint in waiting.values():
            joint.start()

    def _add(self, start: _Start, communicator: Communicator, part: Part, *unit: int) -> Part:
        if self._shared:
            key = start, communicator, part.x.dtype, *unit
            self._waiting.setdefault(key, _Joint(start, communicator)).parts.append(part)
        else:
            _Joint(start, communicator, part).start()
        return part


_Start = Callable[[Communicator, list[Part], str], None]
"""Start a joint collective of some parts, described in errors by a string, and set the parts' `wait`."""


class _Joint:
    """The parts of one collective."""

    def __init__(self, start: _Start, communicator: Communicator, *parts: Part) -> None:
        self._start, self._communicator, self.parts = start, communicator, list(parts)

    def start(self) -> None:
        self._start(self._communicator, self.parts, " and ".join(part.what for part in self.parts))
        for part in self.parts:
            del part.x  # The collective holds what it sends.


def _all_gather(communicator: Communicator, parts: list[Part], what: str) -> None:
    if len(parts) == 1:
        parts[0].wait = communicator.all_gather(parts[0].x, what).wait
        return
    pending = communicator.all_gather(torch.cat([part.x.flatten() for part in parts]), what)
    first = 0
    for part in parts:
        part.wait = partial(_columns, pending, first, part.x.shape)
        first += part.x.numel()


def _columns(pending: Pending, first: int, shape: torch.Size) -> Tensor:
    return pending.wait()[:, first : first + shape.numel()].unflatten(1, shape)


def _reduce_scatter(communicator: Communicator, parts: list[Part], what: str) -> None:
    if len(parts) == 1:
        parts[0].wait = communicator.reduce_scatter(parts[0].x, what).wait
        return
    pending = communicator.reduce_scatter(torch.cat([part.x.flatten(1) for part in parts], dim=1), what)
    first = 0
    for part in parts:
        part.wait = partial(_entries, pending, first, part.x.shape[1:])
        first += part.x.shape[1:].numel()


def _entries(pending: Pending, first: int, shape: torch.Size) -> Tensor:
    return pending.wait()[first : first + shape.numel()].view(shape)


def _all_to_all(communicator: Communicator, parts: list[Part], what: str) -> None:
    if len(parts) == 1:
        (part,) = parts
        part.wait = communicator.all_to_all(part.x, list(part.sent), list(part.received), what).wait
        return
    # A unit is (B, D): all entries between dimension 0 and it are rows, too.
    unit, device = parts[0].x.shape[-2:], parts[0].x.device
    per_row = tuple(part.x.shape[1:-2].numel() for part in parts)
    sent, places_sent = _by_rank(tuple(part.sent for part in parts), per_row, device)
    received, places_received = _by_rank(tuple(part.received for part in parts), per_row, device)
    rows = parts[0].x.new_empty(sum(sent), *unit)
    for part, places in zip(parts, places_sent, strict=True):
        rows[places] = part.x.reshape(-1, *unit)
    pending = communicator.all_to_all(rows, sent, received, what)
    for part, places in zip(parts, places_received, strict=True):
        part.wait = partial(_rows, pending, places, (sum(part.received), *part.x.shape[1:]))


def _rows(pending: Pending, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pending.wait()[places].view(shape)


@lru_cache(maxsize=256)
def _by_rank(
    rows: tuple[tuple[int, ...], ...], per_row: tuple[int, ...], device: torch.device
) -> tuple[list[int], list[Tensor]]:
    """Return the units for each rank of a joint buffer, and where in it the units of each part lie.

    Args:
        rows: the number of rows for each rank, of each part.
        per_row: the units of a row, of each part.
        device: where the places are needed.
    """
    counts = torch.tensor(rows) * torch.tensor(per_row)[:, None]
    first = counts.t().flatten().cumsum(0).view_as(counts.t()).t() - counts
    places = []
    for starts, units in zip(first, counts, strict=True):
        shifts = torch.repeat_interleave(starts - (units.cumsum(0) - units), units)
        places.append((shifts + torch.arange(len(shifts))).to(device))
    return counts.sum(0).tolist(), places
