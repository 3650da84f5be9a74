"""How queries meet the keys and values of other ranks: the contract of an exchange, and its strategies.

The operators know the contract alone. An exchange is started, yields rectangles to attend when their
rows have arrived, and takes back what was computed for them:

    forward     start             arrivals() -> put of each -> start_return() -> returned()
    backward    start_backward    arrivals() -> put_gradients of each -> start_return() -> returned_gradients()

To add a strategy, write a class that satisfies `Exchange` in a file of its own, name it in
`Call.exchanges` (attention/call.py), and say in plan/exchange.py who sends what to whom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longnet_dist.plan.blocks import Heads, Rows


@dataclass(frozen=True)
class Arrival:
    """A rectangle of queries and keys, in the shapes of kernels: b rectangles, I queries, J keys.

    Args:
        q: (b, I, M R, D): M key/value heads, each of which R query heads share.
        k, v: (b, J, M, D).
        backward: (dout, out, lse) of the queries in a backward: twice q's shape, and (b, I, M R).
        causal: whether query i sees only keys up to i; then I = J.
        heads: the key/value head of each of the b rectangles and M heads, as F rows of M numbers. The b
            rectangles are F for each sequence of the batch.
        query_rows, key_rows: runs of rows whose positions are those of the queries, and of the keys.
        number: the number of the rectangle within its exchange.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    backward: tuple[Tensor, Tensor, Tensor] | None
    causal: bool
    heads: tuple[tuple[int, ...], ...]
    query_rows: tuple[Rows, ...]
    key_rows: tuple[Rows, ...]
    number: int


Result = tuple[int, Heads, Rows, Tensor, Tensor]
"""(branch, heads, rows, out, lse): the results of a rectangle of this rank's rows, in the rectangle's order."""

GradientResult = tuple[int, Heads, Rows, Tensor | None, Tensor | None, Tensor | None]
"""(branch, heads, rows, dq, dk, dv) of a rectangle of this rank's rows; None for what is not there."""


class Exchange(Protocol):
    """The exchange of one branch, for one forward or one backward. Collective over the ranks that take part."""

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Begin to send this rank's rows of q (B, L, G, R, D), and of k and v (B, L, G, D)."""

    def start_backward(self, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
        """Begin a backward: `results` are (dout, out, lse), the first two shaped like q, lse (B, L, G, R)."""

    def retained(self) -> Tensor:
        """Return what has arrived in the forward, one-dimensional. Call it after `arrivals`."""

    def restore(self, retained: Tensor) -> None:
        """Use what the forward retained, instead of sending it again; called before `start_backward`."""

    def arrivals(self) -> Iterator[Arrival]:
        """Wait for the rows, and yield the rectangles to attend."""

    def put(self, arrival: Arrival, out: Tensor, lse: Tensor) -> None:
        """Store the result of a rectangle: out (b, I, M R, D) and lse (b, I, M R)."""

    def put_gradients(self, arrival: Arrival, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Store the gradients of a rectangle, shaped like its q, k and v."""

    def start_return(self) -> None:
        """Begin to send what was stored to the ranks that own the rows."""

    def returned(self) -> Iterator[Result]:
        """Wait, and yield the results (out, lse) for rows of this rank."""

    def returned_gradients(self) -> Iterator[GradientResult]:
        """Wait, and yield the gradients for rows of this rank."""
