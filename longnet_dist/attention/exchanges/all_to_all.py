"""The strategy `all_to_all`: the ranks of a segment trade heads for rows.

    forward     q, k, v to the ranks that attend their heads    out and lse back
    backward    dout, out, lse (and q, k, v) the same way       dq, dk, dv back

A rank attends some heads for all kept rows of its team (see plan/exchange.py). A segment with at most as
many ranks as key/value heads is one team: then each rank does the same work, causal or not, and computes
exactly what a single process does. Several teams also send their keys to other teams (later ones if causal).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.exchanges import Arrival, GradientResult, Result
from longnet_dist.attention.exchanges.tables import Layout, kept_rows, packed_index, sizes_by_rank
from longnet_dist.attention.merging import merge
from longnet_dist.attention.rows import accumulation_dtype
from longnet_dist.distributed.batch import Batch, Part
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.blocks import Rows, SharedBranch
from longnet_dist.plan.exchange import SharedSegment

_Sizes = tuple[list[int], list[int]]
"""Ranks, and the number of rows for each."""


class AllToAll:
    """The trade of one segment's heads for rows, and its dual; satisfies `exchanges.Exchange`.

    Buffers of queries are (n, R, B, ...), those of keys (n, 2, B, D): n rows of one key/value head each.
    """

    def __init__(self, shared: SharedBranch, mesh: SequenceMesh, batch: Batch) -> None:
        (self._part,) = shared.parts
        self._segment = self._part.segment
        self._number = shared.number
        self._communicator, self._batch = mesh.communicator(self._segment), batch
        self._retained: Tensor | None = None
        self._queries_and_keys: tuple[Tensor, Tensor] | None = None
        self._backward = False

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack this rank's kept rows, and begin to send them."""
        kept, segment = kept_rows(self._segment, q.device), self._segment
        self._arriving_q = self._send_queries(kept.pack(q), "sending queries")
        packed = kept.pack_both(k, v)
        num_teams = sum(segment.sent_keys) // max(1, len(packed))
        rows = packed.expand(num_teams, *packed.shape).flatten(0, 1)
        sent, received = (segment.key_targets, segment.sent_keys), (segment.key_sources, segment.received_keys)
        self._arriving_kv = self._all_to_all(rows, sent, received, "sending keys and values")

    def start_backward(self, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
        """Send dout, out and lse, and q, k and v again unless they were restored."""
        self._backward = True
        kept = kept_rows(self._segment, q.device)
        dout, out, lse = (kept.pack(x) for x in (*results[:2], results[2].unsqueeze(-1)))
        rows = torch.cat([dout, out, _as_columns(lse, out.dtype)], dim=-1)
        self._arriving_results = self._send_queries(rows, "sending the gradients of results")
        if self._retained is None:
            self.start(q, k, v)
            return
        queries, keys = self._segment.arriving_rows
        batch, _, _, shared_by, dim = q.shape
        shapes = (queries, shared_by, batch, dim), (keys, 2, batch, dim)
        q_flat, kv_flat = self._retained.split([torch.Size(shape).numel() for shape in shapes])
        self._queries_and_keys = q_flat.view(shapes[0]), kv_flat.view(shapes[1])

    def retained(self) -> Tensor:
        """Return the queries, keys and values that arrived, flat."""
        return torch.cat([x.flatten() for x in self._arrived()])

    def restore(self, retained: Tensor) -> None:
        """Use what the forward retained."""
        self._retained = retained

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the rectangles of the heads that this rank attends."""
        queries, keys = self._arrived()
        results = self._arriving_results.wait() if self._backward else None
        self._stored: list[tuple[Tensor, ...] | None] = [None] * len(self._rectangles(queries))
        self._key_grads = torch.zeros_like(keys) if self._backward else keys
        dim = queries.shape[-1]
        for number, rectangle in enumerate(self._rectangles(queries)):
            q = _heads_last(queries[rectangle.queries])
            k, v = (x.movedim(-2, 0) for x in keys[rectangle.keys].unbind(-3))
            backward = None
            if results is not None:
                columns = results[rectangle.queries]
                lse = _from_columns(columns[..., 2 * dim :], accumulation_dtype(q.dtype))
                backward = (
                    _heads_last(columns[..., :dim]),
                    _heads_last(columns[..., dim : 2 * dim]),
                    _heads_last(lse).squeeze(-1),
                )
            rows = (rectangle.query_rows,), (rectangle.key_rows,)
            yield Arrival(q, k, v, backward, rectangle.causal, (rectangle.heads,), *rows, number)

    def put(self, arrival: Arrival, out: Tensor, lse: Tensor) -> None:
        """Store a result, merged with that of the same queries and other keys."""
        first = self._first_of(arrival)
        stored = self._stored[first]
        if stored is not None:
            out, lse = merge(stored[0], stored[1], out, lse)
        self._stored[first] = (out, lse)

    def put_gradients(self, arrival: Arrival, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Store the gradients of a rectangle."""
        first = self._first_of(arrival)
        stored = self._stored[first]
        self._stored[first] = (dq if stored is None else stored[0] + dq.to(accumulation_dtype(dq.dtype)),)
        index = self._rectangles(dq)[arrival.number].keys
        for which, grad in enumerate((dk, dv)):
            self._key_grads[index, which] = grad.movedim(0, -2)

    def start_return(self) -> None:
        """Begin to send results, or gradients, to the ranks that own the rows."""
        queries, _ = self._arrived()
        segment, dtype = self._segment, queries.dtype
        columns = queries.shape[-1] + (0 if self._backward else _num_columns(dtype))
        rows = queries.new_empty(*queries.shape[:-1], columns)
        for rectangle, stored in zip(self._rectangles(queries), self._stored, strict=True):
            if stored is not None:
                parts = [stored[0].to(dtype)]
                if not self._backward:
                    parts.append(_as_columns(stored[1].unsqueeze(-1), dtype))
                by_head = [x.unflatten(2, (-1, queries.shape[1])).movedim(0, -2) for x in parts]
                rows[rectangle.queries] = torch.cat(by_head, dim=-1)
        what = "returning the gradients of queries" if self._backward else "returning results"
        self._returning_q = self._send_queries(rows, what, back=True)
        if self._backward:
            sent, received = (segment.key_sources, segment.received_keys), (segment.key_targets, segment.sent_keys)
            what = "returning the gradients of keys and values"
            self._returning_kv = self._all_to_all(self._key_grads, sent, received, what)

    def returned(self) -> Iterator[Result]:
        """Wait for the results of this rank's rows."""
        rows = self._returning_q.wait()
        dim = rows.shape[-1] - _num_columns(rows.dtype)
        for own in self._part.own:
            columns = rows[packed_index(self._segment, own.heads, own.rows, rows.device)].movedim(-2, 0)
            lse = _from_columns(columns[..., dim:], accumulation_dtype(rows.dtype)).squeeze(-1)
            yield self._number, own.heads, own.rows, columns[..., :dim], lse

    def returned_gradients(self) -> Iterator[GradientResult]:
        """Wait for the gradients of this rank's rows; those of keys are summed over teams."""
        dq_rows, by_team = self._returning_q.wait(), self._returning_kv.wait()
        teams = len(by_team) // max(1, len(dq_rows))
        by_team = by_team.unflatten(0, (teams, -1)) if teams else by_team[None]
        kv_rows = by_team[0] if len(by_team) == 1 else by_team.sum(0, dtype=accumulation_dtype(by_team.dtype))
        for own in self._part.own:
            index = packed_index(self._segment, own.heads, own.rows, dq_rows.device)
            dq, dk, dv = (x.movedim(-2, 0) for x in (dq_rows[index], *kv_rows[index].unbind(-3)))
            yield self._number, own.heads, own.rows, dq, dk, dv

    def _arrived(self) -> tuple[Tensor, Tensor]:
        if self._queries_and_keys is None:
            self._queries_and_keys = self._arriving_q.wait(), self._arriving_kv.wait()
        return self._queries_and_keys

    def _rectangles(self, like: Tensor) -> tuple[_Rectangle, ...]:
        return _rectangles(self._segment, like.device)

    def _first_of(self, arrival: Arrival) -> int:
        """Return the number of the first rectangle of an arrival's queries."""
        return self._rectangles(arrival.q)[arrival.number].first

    def _send_queries(self, rows: Tensor, doing: str, back: bool = False) -> Part:
        """Send rows of queries, or their results, within the team; `back` to the ranks that own them."""
        segment = self._segment
        team = list(segment.team_of(segment.rank))
        counts = segment.sent_queries, segment.received_queries
        sent, received = reversed(counts) if back else counts
        return self._all_to_all(rows, (team, sent), (team, received), doing)

    def _all_to_all(self, rows: Tensor, sent: _Sizes, received: _Sizes, doing: str) -> Part:
        """Send rows to, and receive rows from, the ranks that `sent` and `received` name with numbers of rows."""
        segment = self._segment
        ranks = segment.first_rank, segment.num_ranks
        sizes = sizes_by_rank(*ranks, sent), sizes_by_rank(*ranks, received)
        return self._batch.all_to_all(self._communicator, rows, *sizes, f"{doing} of {segment}")


class _Rectangle(NamedTuple):
    """Heads that keep equally many rows, with the same distances from queries to keys.

    Args:
        heads: the key/value heads.
        causal: see `Arrival`.
        query_rows, key_rows: the positions of the first head's rows.
        queries, keys: where the rows lie in the buffers, int64, (I, heads) and (J, heads).
        first: the number of the first rectangle with these queries.
    """

    heads: tuple[int, ...]
    causal: bool
    query_rows: Rows
    key_rows: Rows
    queries: Tensor
    keys: Tensor
    first: int


@lru_cache(maxsize=256)
def _rectangles(segment: SharedSegment, device: torch.device) -> tuple[_Rectangle, ...]:
    """Return what this rank attends: its heads in groups, with the keys of its team, and of others."""
    team, heads = segment.team_of(segment.rank), segment.heads_of(segment.rank)
    query_layout, key_layout = Layout(segment, team, heads), Layout(segment, segment.key_sources, heads)
    lo, hi = segment.rows_of(team)
    spans = [(lo, hi), (segment.start, lo)] if segment.causal else [(segment.start, segment.stop)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in heads:
        first, count = segment.kept(head, lo, hi)
        runs = [segment.kept(head, *span) for span in spans]
        groups.setdefault((count, *(x for key, n in runs for x in (key - first, n))), []).append(head)
    rectangles: list[_Rectangle] = []
    for members in groups.values():
        index_of_first = len(rectangles)
        for number, span in enumerate(spans):
            query_rows, queries = _rows(segment, members, (lo, hi), query_layout)
            key_rows, keys = _rows(segment, members, span, key_layout)
            if query_rows.count and key_rows.count:
                causal = segment.causal and number == 0
                tables = queries.to(device), keys.to(device)
                rectangles.append(_Rectangle(tuple(members), causal, query_rows, key_rows, *tables, index_of_first))
    return tuple(rectangles)


def _rows(segment: SharedSegment, heads: list[int], span: tuple[int, int], layout: Layout) -> tuple[Rows, Tensor]:
    """Return the rows that heads keep in a span of global rows, and where they lie in a buffer: (count, heads)."""
    r = segment.branch.dilation_rate
    kept = [segment.kept(head, *span) for head in heads]
    first, count = kept[0]
    positions = torch.tensor([first for first, _ in kept]) + r * torch.arange(count)[:, None]
    return Rows(0, 0, r, count, first, r), layout.index(positions, torch.tensor(heads))


def _heads_last(x: Tensor) -> Tensor:
    """Turn rows of a buffer, (I, heads, R, B, ...), into (B, I, heads R, ...)."""
    return x.movedim(3, 0).flatten(2, 3)


def _num_columns(dtype: torch.dtype) -> int:
    """The number of elements of a dtype that have the bits of one lse."""
    return accumulation_dtype(dtype).itemsize // dtype.itemsize


def _as_columns(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """View lse (..., 1) as elements of another dtype with the same bits, to send it in one buffer with results."""
    # A copy in one dimension: torch refuses to view some strides of dimensions of size 1, and odd offsets.
    return lse.flatten().clone().view(dtype).view(*lse.shape[:-1], _num_columns(dtype))


def _from_columns(columns: Tensor, dtype: torch.dtype) -> Tensor:
    return columns.flatten().clone().view(dtype).view(*columns.shape[:-1], 1)
