"""How a rank receives keys and values from other ranks: the contract of an exchange, and its strategies.

The operators know the contract alone. An exchange is started, it yields rectangles to attend when
their keys have arrived, and it returns the gradients of those keys to their owners:

    forward     start(k, v)          arrivals() -> attend each
    backward    start or restore     arrivals() -> add_gradients of each -> start_return() -> returned()

To add a strategy, write a class that satisfies `Exchange` in a file of its own, and choose it in
`Call.start_exchanges` (attention/call.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longnet_dist.plan.blocks import Heads, Rows


@dataclass(frozen=True)
class Arrival:
    """A rectangle of this rank's queries, and the keys and values that have arrived for it.

    Args:
        heads: the heads of the rectangle.
        rows: its queries, rows of this rank's chunk.
        key_rows: the positions of its keys, in order.
        k, v: (B, 1, F, J, M, D): F phases of M key/value heads each.
        number: the number of the rectangle within its exchange.
    """

    heads: Heads
    rows: Rows
    key_rows: tuple[Rows, ...]
    k: Tensor
    v: Tensor
    number: int


class Exchange(Protocol):
    """The exchange of one segment of one branch, for one forward or one backward. Collective over its ranks."""

    def start(self, k: Tensor, v: Tensor) -> None:
        """Begin to send this rank's kept rows of k and v, (B, L, G, D), and to receive the others'."""

    def restore(self, k: Tensor, retained: Tensor) -> None:
        """Use what `retained` returned in the forward; called in place of `start`."""

    def arrivals(self) -> Iterator[Arrival]:
        """Wait for the keys and values, and yield the rectangles to attend."""

    def retained(self) -> Tensor:
        """Return what has arrived, one-dimensional, for `restore` in the backward. Call it after `arrivals`."""

    def add_gradients(self, arrival: Arrival, dk: Tensor, dv: Tensor) -> None:
        """Store the gradients of the keys and values of one rectangle, shaped like them."""

    def start_return(self) -> None:
        """Begin to send all stored gradients to the ranks that own the rows."""

    def returned(self) -> Iterator[tuple[Heads, Rows, Tensor, Tensor]]:
        """Wait, and yield (heads, rows, dk, dv): what the other ranks computed for rows of this chunk."""
