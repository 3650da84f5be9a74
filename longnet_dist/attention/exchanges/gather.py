"""The all-gather strategy: every rank of a segment receives the kept keys and values of all of them.

    forward     all_gather     (2, B, sent, G, D) -> (P, 2, B, sent, G, D)     K and V in one collective
    backward    reduce_scatter (P, 2, B, sent, G, D) -> (2, B, sent, G, D)     dK and dV, summed

P ranks hold the segment. Each sends `sent` rows, the most that one of them keeps in any phase. Only this
file knows that layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longnet_dist.attention.exchanges import Arrival
from longnet_dist.attention.rows import rectangle
from longnet_dist.distributed.collectives import Pending
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.blocks import Heads, RemoteBlock, Rows, SharedSegment


def retained_size(segment: SharedSegment, batch: int, heads_and_dim: Sequence[int]) -> int:
    """Return the number of elements of `Gather.retained`."""
    return segment.num_ranks * 2 * batch * segment.sent_rows * math.prod(heads_and_dim)


class Gather:
    """The gather of one segment's keys and values, and its dual; satisfies `exchanges.Exchange`.

    Args:
        segment: this rank's part of the segment.
        mesh: the ranks of the sequence.
    """

    def __init__(self, segment: SharedSegment, mesh: SequenceMesh) -> None:
        self._segment = segment
        self._communicator = mesh.communicator(segment)
        self._reduce_dtype = mesh.reduce_dtype
        self._arriving: Pending | None = None
        self._gathered: Tensor | None = None
        self._grads: Tensor | None = None
        self._returning: Pending | None = None

    def start(self, k: Tensor, v: Tensor) -> None:
        """Pack this rank's kept rows, and start the gather."""
        packed = k.new_zeros(2, len(k), self._segment.sent_rows, *k.shape[2:])
        for packing in self._segment.packing:
            for x, buffer in zip((k, v), packed, strict=True):
                target = rectangle(buffer, packing.heads, packing.packed)
                target.copy_(rectangle(x, packing.heads, packing.rows))
        self._arriving = self._communicator.all_gather(packed, self._describe("gathering the keys and values"))

    def restore(self, k: Tensor, retained: Tensor) -> None:
        """Use the keys and values that the forward gathered."""
        shape = (self._segment.num_ranks, 2, len(k), self._segment.sent_rows, *k.shape[2:])
        self._gathered = retained.view(shape)

    def arrivals(self) -> Iterator[Arrival]:
        """Wait for the gather, and yield the rectangles of this rank's queries and the peers' keys."""
        gathered = self._wait()
        for number, block in enumerate(self._segment.remote):
            k, v = (_join(gathered[:, which], block) for which in (0, 1))
            yield Arrival(block.heads, block.rows, tuple(block.key_rows), k, v, number)

    def retained(self) -> Tensor:
        """Return the gathered keys and values, flat."""
        return self._wait().flatten()

    def add_gradients(self, arrival: Arrival, dk: Tensor, dv: Tensor) -> None:
        """Copy the gradients of a rectangle's keys into their owners' parts of the send buffer."""
        if self._grads is None:
            self._grads = self._empty_gradients()
        block = self._segment.remote[arrival.number]
        for which, grad in enumerate((dk, dv)):
            pieces = grad.split([rows.count for rows in block.key_rows], dim=3)
            for (peer, rows), piece in zip(block.keys, pieces, strict=True):
                rectangle(self._grads[peer, which], block.heads, rows).copy_(piece)

    def start_return(self) -> None:
        """Start the reduce-scatter of dK and dV."""
        grads = self._empty_gradients() if self._grads is None else self._grads
        what = self._describe("reducing the gradients of keys and values")
        self._returning = self._communicator.reduce_scatter(grads, what)

    def returned(self) -> Iterator[tuple[Heads, Rows, Tensor, Tensor]]:
        """Wait for the reduce-scatter, and yield this rank's rows."""
        assert self._returning is not None
        summed = self._returning.wait()
        for packing in self._segment.packing:
            dk, dv = (rectangle(part, packing.heads, packing.packed) for part in summed)
            yield packing.heads, packing.rows, dk, dv

    def _wait(self) -> Tensor:
        if self._gathered is None:
            assert self._arriving is not None
            self._gathered = self._arriving.wait()
        return self._gathered

    def _empty_gradients(self) -> Tensor:
        gathered = self._wait()
        return torch.zeros_like(gathered, dtype=torch.promote_types(gathered.dtype, self._reduce_dtype))

    def _describe(self, doing: str) -> str:
        segment = self._segment
        return f"{doing} of branch {segment.branch} over ranks {segment.first_rank} to {segment.last_rank}"


def _join(gathered: Tensor, block: RemoteBlock) -> Tensor:
    """Join the keys of all peers of a block in one rectangle: (P, B, sent, G, D) -> (B, 1, F, J, M, D)."""
    return torch.cat([rectangle(gathered[peer], block.heads, rows) for peer, rows in block.keys], dim=3)
