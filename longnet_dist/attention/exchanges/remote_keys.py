"""What the strategies `all_gather` and `exchange` share: a rank's own queries attend keys that arrive from others.

Subclasses say how keys travel. Results need no way back, and the gradients of keys return to their owners.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from longnet_dist.attention.exchanges import Arrival, GradientResult, Result
from longnet_dist.attention.exchanges.tables import Layout, kept_rows, packed_index, positions_and_heads, unpack_both
from longnet_dist.attention.rows import as_queries, rectangle
from longnet_dist.distributed.batch import Batch
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.blocks import RemoteBlock, SharedBranch, SharedPart
from longnet_dist.plan.exchange import SharedSegment


class RemoteKeys(ABC):
    """The keys of other ranks, as they arrive in a buffer (n, 2, B, D): n rows of K and V, of one head each.

    Args:
        shared: the branch, and this rank's parts of shared segments.
        mesh: the ranks of the sequence.
        batch: the collectives of the layer.
    """

    def __init__(self, shared: SharedBranch, mesh: SequenceMesh, batch: Batch) -> None:
        self.shared, self.mesh, self.batch = shared, mesh, batch
        self._blocks = [(part, block) for part in shared.parts for block in part.remote]
        self._results: list[Result] = []
        self._query_grads: list[Tensor] = []
        self._buffer: Tensor | None = None
        self._backward: tuple[Tensor, Tensor, Tensor] | None = None

    @abstractmethod
    def _start_keys(self, packed: list[Tensor], like: Tensor) -> None:
        """Begin to send the packed rows of each part, (n, 2, B, D), of the dtype and B, D of `like`."""

    @abstractmethod
    def _wait_keys(self) -> Tensor:
        """Wait for the rows of other ranks: (n, 2, B, D)."""

    @abstractmethod
    def _new_gradients(self, keys: Tensor) -> Tensor:
        """Return zeros for the gradients of the rows that arrived."""

    @abstractmethod
    def _start_gradients(self, grads: Tensor) -> None:
        """Begin to send the gradients to the ranks that own the rows."""

    @abstractmethod
    def _wait_gradients(self) -> list[Tensor]:
        """Wait for the gradients of the rows that each part sent, summed over the ranks: (n, 2, B, D)."""

    @abstractmethod
    def _layout(self, part: SharedPart) -> tuple[int, tuple[int, ...], int | None]:
        """Return where a part's rows begin in the buffer, their sources, and the rows of each source if padded."""

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack this rank's kept rows of k and v, and begin to send them."""
        self._q = q
        packed = [self._pack(part, k, v) for part in self.shared.parts]
        self._start_keys(packed, k)

    def start_backward(self, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
        """Send k and v again, unless they were restored."""
        self._backward = results
        if self._buffer is None:
            self.start(q, k, v)
        else:
            self._q = q
            self._buffer = self._buffer.view(-1, 2, len(k), k.shape[-1])

    def retained(self) -> Tensor:
        """Return the keys and values that arrived, flat."""
        return self._keys().flatten()

    def restore(self, retained: Tensor) -> None:
        """Use the keys and values that the forward retained."""
        self._buffer = retained

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the rectangles of this rank's queries and the keys that arrived."""
        keys = self._keys()
        for number, (part, block) in enumerate(self._blocks):
            k, v = unpack_both(keys, self._index(part, block))
            q, *backward = (
                as_queries(rectangle(x, block.heads, block.rows)) for x in (self._q, *(self._backward or ()))
            )
            heads, query_rows = block.heads.table, (block.rows,)
            results = (backward[0], backward[1], backward[2]) if backward else None
            yield Arrival(q, k, v, results, False, heads, query_rows, block.key_rows, number)

    def put(self, arrival: Arrival, out: Tensor, lse: Tensor) -> None:
        """Store a result, which stays on this rank."""
        _, block = self._blocks[arrival.number]
        self._results.append((self.shared.number, block.heads, block.rows, out, lse))

    def put_gradients(self, arrival: Arrival, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Store the gradients of a rectangle: those of keys at their places in a buffer like the one that arrived."""
        if not self._query_grads:
            self._grads = self._new_gradients(self._keys())
        part, block = self._blocks[arrival.number]
        self._query_grads.append(dq)
        index = self._index(part, block)
        for which, grad in enumerate((dk, dv)):
            rows = grad.unflatten(0, (-1, index.shape[0])).movedim(0, -2)
            self._grads[index, which] = rows.to(self._grads.dtype)

    def start_return(self) -> None:
        """Begin to return the gradients of keys; a forward returns nothing."""
        if self._backward is not None:
            grads = self._grads if self._query_grads else self._new_gradients(self._keys())
            self._start_gradients(grads)

    def returned(self) -> Iterator[Result]:
        """Yield the results of the forward."""
        yield from self._results

    def returned_gradients(self) -> Iterator[GradientResult]:
        """Yield the gradients of this rank's queries, and wait for those of its keys."""
        number = self.shared.number
        for (_, block), dq in zip(self._blocks, self._query_grads, strict=True):
            yield number, block.heads, block.rows, dq, None, None
        for part, grads in zip(self.shared.parts, self._wait_gradients(), strict=True):
            for own in part.own:
                rows = grads[packed_index(part.segment, own.heads, own.rows, grads.device)]
                dk, dv = (x.movedim(-2, 0) for x in rows.unbind(-3))
                yield number, own.heads, own.rows, None, dk, dv

    def _pack(self, part: SharedPart, k: Tensor, v: Tensor) -> Tensor:
        return kept_rows(part.segment, k.device).pack_both(k, v)

    def _keys(self) -> Tensor:
        if self._buffer is None:
            self._buffer = self._wait_keys()
        return self._buffer

    def _index(self, part: SharedPart, block: RemoteBlock) -> Tensor:
        return _key_index(part.segment, block, *self._layout(part), self._keys().device)


@lru_cache(maxsize=64)
def _key_index(
    segment: SharedSegment,
    block: RemoteBlock,
    first: int,
    sources: tuple[int, ...],
    rows_per_source: int | None,
    device: torch.device,
) -> Tensor:
    """Return where the keys of a block lie in the buffer that arrives: int64, (F, J, M)."""
    layout = Layout(segment, sources, range(len(segment.phases)), rows_per_source)
    runs = [layout.index(*positions_and_heads(block.heads, rows)) for rows in block.key_rows]
    return (torch.cat(runs, dim=1) + first).to(device)
