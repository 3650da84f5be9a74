"""Results and gradients in low precision, collected as they come and merged once, in float32 arithmetic.

No float32 tensor of the size of the result exists: a Triton kernel holds the merged rows in registers, and
torch code takes some columns of one head at a time. The order of the arithmetic is that of the branches, so the
bits of a result do not depend on the order in which the pieces came.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longnet_dist.attention.rows import is_whole, own_memory, rectangle, uses_triton
from longnet_dist.plan.blocks import Heads, Rows

_CHUNK = 1 << 18
"""The number of elements that torch code merges at once, if a head has more: 1 MiB in float32."""
_COLUMNS = 32
"""The number of columns of a larger head that it merges at once: a cache line in bfloat16."""


@dataclass(frozen=True)
class Piece:
    """The results of a rectangle.

    Args:
        heads, rows: the rectangle.
        values: outputs or gradients, (B, S, F, I, M, R, D) with any strides; R = 1 for keys and values.
        lse: the natural logarithms of softmax denominators, float32, (B, S, F, I, M, R); None for gradients.
    """

    heads: Heads
    rows: Rows
    values: Tensor
    lse: Tensor | None = None


class CollectedResults:
    """Attention results of all queries, which `result` merges by softmax over (out, lse).

    Args:
        like: a tensor with the shape, dtype and device of the queries, (B, L, G, R, D).
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.pieces: list[tuple[int, Piece]] = []

    def merge(self, branch: int, heads: Heads, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Collect the results of a rectangle over other keys: `out` and a finite `lse`, in the rectangle's order."""
        values = _shaped(out, self.like, heads, rows)
        self.pieces.append((branch, Piece(heads, rows, values, lse.reshape(values.shape[:-1]).float())))

    def result(self) -> tuple[Tensor, Tensor]:
        """Merge; returns out (B, L, G, R, D) in the dtype of `like`, and lse (B, L, G, R) in float32.

        A row that no piece covers has out 0 and lse -inf.
        """
        pieces, self.pieces = _in_order(self.pieces), []
        lse = torch.empty(self.like.shape[:-1], dtype=torch.float32, device=self.like.device)
        return combine(pieces, self.like, lse), lse


class CollectedSums:
    """Gradients of all rows, which `result` sums.

    Args:
        like: a tensor with the shape, dtype and device of the sum, (B, L, G, R, D) or (B, L, G, D).
    """

    def __init__(self, like: Tensor) -> None:
        self.shape = like.shape
        self.like = like if like.dim() == 5 else like.unsqueeze(3)
        self.pieces: list[tuple[int, Piece]] = []

    def add(self, branch: int, heads: Heads, rows: Rows, part: Tensor) -> None:
        """Collect `part`, which has as many elements as the rectangle."""
        self.pieces.append((branch, Piece(heads, rows, _shaped(part, self.like, heads, rows))))

    def result(self) -> Tensor:
        """Sum; returns the dtype of `like`. Rows to which nothing was added are 0."""
        pieces, self.pieces = _in_order(self.pieces), []
        return combine(pieces, self.like, None).view(self.shape)


def combine(pieces: list[Piece], like: Tensor, lse: Tensor | None) -> Tensor:
    """Merge pieces, or sum them if `lse` is None; writes `lse`, and returns the values of all rows.

    The first piece that holds every row in the order of the result becomes it, and other pieces are merged into
    its memory: no row is written before it is read.
    """
    whole = next((piece.values for piece in pieces if _is_result(piece, like)), None)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device) if whole is None else whole.view(like.shape)
    if whole is not None and len(pieces) == 1:
        if lse is not None and pieces[0].lse is not None:
            lse.copy_(pieces[0].lse.reshape(lse.shape))
    elif uses_triton(out):
        from longnet_dist.attention.merging import triton_kernel

        triton_kernel.combine(pieces, out, lse)
    else:
        combine_by_torch(pieces, out, lse)
    return out


def combine_by_torch(pieces: list[Piece], out: Tensor, lse: Tensor | None) -> None:
    """Merge pieces into `out` (B, L, G, R, D) and `lse` (B, L, G, R), or sum them if `lse` is None.

    `out` may be the memory of a piece that covers every row.
    """
    for part_of_out, part_of_lse, parts in _by_head(pieces, out, lse):
        weights = None if part_of_lse is None else _weights(parts, part_of_lse)
        for columns in _column_blocks(part_of_out):
            total = torch.zeros(part_of_out[..., columns].shape, dtype=torch.float32, device=out.device)
            for number, piece in enumerate(parts):
                target, values = rectangle(total, piece.heads, piece.rows), piece.values[..., columns].float()
                if weights is None:
                    target += values
                else:
                    target.addcmul_(values, weights[number].unsqueeze(-1))
            part_of_out[..., columns] = total


def _weights(pieces: list[Piece], lse: Tensor) -> list[Tensor]:
    """Return the share of each piece in the softmax of its rows, (B, S, F, I, M, R), and write the merged lse."""
    # On CPUs in float64: in float32 the bits of an exp depend on whether it falls into a vector or a loop's remainder.
    dtype = torch.float64 if lse.device.type == "cpu" else torch.float32
    top = torch.full(lse.shape, -torch.inf, dtype=dtype, device=lse.device)
    for piece, lse_of_piece in _with_lse(pieces):
        target = rectangle(top, piece.heads, piece.rows)
        torch.maximum(target, lse_of_piece.to(dtype), out=target)
    top.masked_fill_(top == -torch.inf, 0)
    denominator = torch.zeros_like(top)
    exponentials = []
    for piece, lse_of_piece in _with_lse(pieces):
        exponentials.append((lse_of_piece.to(dtype) - rectangle(top, piece.heads, piece.rows)).exp_())
        target = rectangle(denominator, piece.heads, piece.rows)
        target += exponentials[-1]
    lse.copy_(top + denominator.log())
    denominator.masked_fill_(denominator == 0, 1)
    shares = zip(exponentials, pieces, strict=True)
    return [(share / rectangle(denominator, piece.heads, piece.rows)).float() for share, piece in shares]


def _with_lse(pieces: list[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    for piece in pieces:
        assert piece.lse is not None
        yield piece, piece.lse


def _by_head(
    pieces: list[Piece], out: Tensor, lse: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, list[Piece]]]:
    """Yield (out, lse, pieces) of one query head of one sequence at a time; of all if they are few, or on a GPU."""
    if out.numel() <= _CHUNK or out.device.type != "cpu":
        yield out, lse, pieces
        return
    batch, _, num_kv_heads, shared_by, _ = out.shape
    for g in range(num_kv_heads):
        pieces_of_head = [part for piece in pieces for part in _of_head(piece, g)]
        for b in range(batch):
            for r in range(shared_by):
                index = slice(b, b + 1), ..., slice(r, r + 1)
                parts = [
                    replace(x, values=x.values[*index, :], lse=None if x.lse is None else x.lse[index])
                    for x in pieces_of_head
                ]
                place = slice(b, b + 1), slice(None), slice(g, g + 1), slice(r, r + 1)
                yield out[place], None if lse is None else lse[place], parts


def _of_head(piece: Piece, head: int) -> Iterator[Piece]:
    """Yield the part of a piece that belongs to one key/value head, as that of head 0; a piece has it at most once."""
    heads, rows = piece.heads, piece.rows
    for f in range(heads.phases):
        m, rest = divmod(head - heads.first - f * heads.phase_step, heads.step)
        if rest == 0 and 0 <= m < heads.per_phase:
            index = slice(None), slice(None), slice(f, f + 1), slice(None), slice(m, m + 1)
            lse = None if piece.lse is None else piece.lse[index]
            first = rows.first + f * rows.phase_step
            yield Piece(Heads(0, 1, 0, 1, 1), replace(rows, first=first), piece.values[index], lse)


def _column_blocks(out: Tensor) -> Iterator[slice]:
    """Yield the columns of D that are merged at once."""
    dim = out.shape[-1]
    size = dim if out.numel() <= _CHUNK or out.device.type != "cpu" else _COLUMNS
    for first in range(0, dim, size):
        yield slice(first, min(first + size, dim))


def _shaped(x: Tensor, like: Tensor, heads: Heads, rows: Rows) -> Tensor:
    """Return the values of a rectangle as (B, S, F, I, M, R, D), in the dtype of all."""
    shape = len(like), rows.segments, heads.phases, rows.count, heads.per_phase, *like.shape[3:]
    return x.reshape(shape).to(like.dtype)


def _in_order(pieces: list[tuple[int, Piece]]) -> list[Piece]:
    """Return the pieces in the order of their branches; within a branch, in that in which they came."""
    return [piece for _, piece in sorted(pieces, key=lambda entry: entry[0])]


def _is_result(piece: Piece, like: Tensor) -> bool:
    """Return whether the values of a piece, as they lie in memory, can be those of all rows."""
    values = piece.values
    return is_whole(like, piece.heads, piece.rows) and values.is_contiguous() and own_memory(values) is values
