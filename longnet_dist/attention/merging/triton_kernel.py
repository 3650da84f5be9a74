"""The merge of collected pieces as one Triton kernel, which reads each element once and writes each row once.

A program merges some rows of one query head. It visits the pieces that reach its tile of rows, and computes where
its rows lie in each from the integers of the rectangle. What a kernel needs to know of the pieces is in two tables:

    geometry     integers of each piece, and the pieces of each tile: made once per plan, and cached
    addresses    where the pieces lie in memory: written by a kernel whose arguments they are

So nothing is copied from the host after the first call of a plan, and a CUDA graph can record later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.attention.merging.collected import Piece
from longnet_dist.internals import TRITON_OPTIONS
from longnet_dist.plan.blocks import Heads, Rows

_TILE = 128
"""Rows for which one list of pieces is made."""
_ELEMENTS = 4096
"""The number of elements of a program, if its rows are not too few or too many."""
_FEW_ROWS = 16
_FAR = (1 << 31) - 1
"""Above the number of any row."""
_FIELDS = tl.constexpr(24)
"""The number of integers of a piece, in the order of `_integers`."""
_ADDRESSES = 16
"""The number of addresses that are written at once."""
_MANY = 256
"""The number of addresses above which one copy from the host is faster; only documents have as many."""


def combine(pieces: Sequence[Piece], out: Tensor, lse: Tensor | None) -> None:
    """Merge pieces into `out` (B, L, G, R, D) and `lse` (B, L, G, R), or sum them if `lse` is None.

    `out` and `lse` are contiguous; `out` may be the memory of a piece that covers every row.
    """
    batch, num_rows, num_kv_heads, shared_by, dim = out.shape
    if not out.numel():
        return
    pieces = [_with_unit_stride(piece) for piece in pieces]
    geometry = _geometry(tuple(_key(piece) for piece in pieces), num_rows, out.device)
    if out.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(geometry)
    columns = triton.next_power_of_2(dim)
    rows = min(_TILE, max(_FEW_ROWS, _ELEMENTS // columns))
    programs = batch * num_kv_heads * shared_by * triton.cdiv(num_rows, rows)
    assert max(programs, num_rows + _TILE) < _FAR
    with torch.cuda.device_of(out):
        _combine[(programs,)](
            out, out if lse is None else lse, _addresses(pieces, out.device), *geometry, len(pieces),
            num_rows, num_kv_heads, shared_by,
            WEIGHTED=lse is not None, ALIGNED=all(_is_aligned(piece.values) for piece in pieces),
            DIM=dim, COLUMNS=columns, ROWS=rows, TILE=_TILE, **TRITON_OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pieces", "num_rows", "num_kv_heads", "shared_by"])
def _combine(
    out: tl.tensor,
    lse: tl.tensor,
    addresses: tl.tensor,
    geometry: tl.tensor,
    first_of_tile: tl.tensor,
    pieces_of_tiles: tl.tensor,
    num_pieces: tl.tensor,
    num_rows: tl.tensor,
    num_kv_heads: tl.tensor,
    shared_by: tl.tensor,
    WEIGHTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    num_heads = num_kv_heads * shared_by
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    blocks = (num_rows + ROWS - 1) // ROWS
    batch = (block // blocks).to(tl.int64)
    first = block % blocks * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    kv_head = head // shared_by
    shared = (head % shared_by).to(tl.int64)

    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.full([ROWS], 0.0, tl.float32)
    for n in range(tl.load(first_of_tile + first // TILE), tl.load(first_of_tile + first // TILE + 1)):
        piece = tl.load(pieces_of_tiles + n)
        of = geometry + piece * _FIELDS
        # The head is that of step `outer` along one dimension of the rectangle, and `inner` along the other.
        number = kv_head - tl.load(of).to(tl.int32)
        outer_step = tl.load(of + 2).to(tl.int32)
        inner_step = tl.load(of + 4).to(tl.int32)
        outer = number // outer_step
        inner = (number - outer * outer_step) // inner_step
        is_within = (number >= 0) & (outer < tl.load(of + 1)) & (inner < tl.load(of + 3))
        if is_within & (outer * outer_step + inner * inner_step == number):
            # The row is the i-th kept one of a segment.
            first_row = tl.load(of + 5) + outer * tl.load(of + 6) + inner * tl.load(of + 7)
            row_step = tl.load(of + 8).to(tl.int32)
            segment_step = tl.load(of + 11).to(tl.int32)
            offset = rows - first_row.to(tl.int32)
            segment = offset // segment_step
            in_segment = offset - segment * segment_step
            i = in_segment // row_step
            kept = (offset >= 0) & (rows < num_rows) & (segment < tl.load(of + 10)) & (i < tl.load(of + 9))
            kept = kept & (i * row_step == in_segment)
            segment = segment.to(tl.int64)
            i = i.to(tl.int64)

            start = batch * tl.load(of + 12) + outer * tl.load(of + 13) + inner * tl.load(of + 14)
            start += shared * tl.load(of + 15)
            places = start + segment * tl.load(of + 16) + i * tl.load(of + 17)
            values = tl.load(addresses + piece).to(tl.pointer_type(out.dtype.element_ty))
            values = values + (places[:, None] + columns[None, :])
            if ALIGNED:
                values = tl.multiple_of(values, [1, 16])
            mask = kept[:, None]
            if DIM != COLUMNS:
                mask = mask & (columns < DIM)[None, :]
            loaded = tl.load(values, mask=mask, other=0).to(tl.float32)
            if WEIGHTED:
                start = batch * tl.load(of + 18) + outer * tl.load(of + 19) + inner * tl.load(of + 20)
                start += shared * tl.load(of + 21)
                places = start + segment * tl.load(of + 22) + i * tl.load(of + 23)
                lses = tl.load(addresses + num_pieces + piece).to(tl.pointer_type(tl.float32)) + places
                lse_of_piece = tl.load(lses, mask=kept, other=float("-inf"))
                higher = tl.maximum(top, lse_of_piece)
                finite = tl.where(higher == float("-inf"), 0.0, higher)
                shrink = tl.exp(top - finite)
                weight = tl.exp(lse_of_piece - finite)
                total = total * shrink[:, None] + loaded * weight[:, None]
                denominator = denominator * shrink + weight
                top = higher
            else:
                total += loaded

    at = (batch * num_rows + rows) * num_heads + head
    if WEIGHTED:
        is_covered = denominator > 0
        divisor = tl.where(is_covered, denominator, 1.0)
        total = total * (1 / divisor)[:, None]
        merged = tl.where(is_covered, top + tl.log(divisor), float("-inf"))
        tl.store(lse + at, merged, mask=rows < num_rows)
    targets = out + (at[:, None] * DIM + columns[None, :])
    mask = (rows < num_rows)[:, None]
    if DIM != COLUMNS:
        mask = mask & (columns < DIM)[None, :]
    tl.store(targets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[f"a{n}" for n in range(_ADDRESSES)])
def _write(
    table: tl.tensor,
    a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, a3: tl.tensor,
    a4: tl.tensor, a5: tl.tensor, a6: tl.tensor, a7: tl.tensor,
    a8: tl.tensor, a9: tl.tensor, a10: tl.tensor, a11: tl.tensor,
    a12: tl.tensor, a13: tl.tensor, a14: tl.tensor, a15: tl.tensor,
) -> None:  # fmt: skip
    tl.store(table, a0)
    tl.store(table + 1, a1)
    tl.store(table + 2, a2)
    tl.store(table + 3, a3)
    tl.store(table + 4, a4)
    tl.store(table + 5, a5)
    tl.store(table + 6, a6)
    tl.store(table + 7, a7)
    tl.store(table + 8, a8)
    tl.store(table + 9, a9)
    tl.store(table + 10, a10)
    tl.store(table + 11, a11)
    tl.store(table + 12, a12)
    tl.store(table + 13, a13)
    tl.store(table + 14, a14)
    tl.store(table + 15, a15)


def _addresses(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """Return the addresses of all values, then of all lse: int64, and some more that nobody reads."""
    tensors = [piece.values for piece in pieces] + [piece.lse for piece in pieces if piece.lse is not None]
    if len(tensors) > _MANY:
        return torch.tensor([x.data_ptr() for x in tensors], device=device)
    table = torch.empty(triton.cdiv(len(tensors), _ADDRESSES) * _ADDRESSES, dtype=torch.int64, device=device)
    for first in range(0, len(tensors), _ADDRESSES):
        addresses = [x.data_ptr() for x in tensors[first : first + _ADDRESSES]]
        # The last one is repeated, because Triton would compile another kernel for small numbers.
        addresses += addresses[-1:] * (_ADDRESSES - len(addresses))
        _write[(1,)](table[first:], *addresses, **TRITON_OPTIONS)
    return table


_Key = tuple[Heads, Rows, tuple[int, ...], tuple[int, ...]]


def _key(piece: Piece) -> _Key:
    return piece.heads, piece.rows, piece.values.stride(), () if piece.lse is None else piece.lse.stride()


class _Geometry(NamedTuple):
    """The pieces, for the kernel.

    Args:
        integers: int64, `_FIELDS` of each piece.
        first_of_tile: int32, where the list of each tile begins, and the last one ends.
        pieces_of_tiles: int32, the numbers of the pieces that reach each tile, in order.
    """

    integers: Tensor
    first_of_tile: Tensor
    pieces_of_tiles: Tensor


_captured: list[_Geometry] = []
"""Tables that a CUDA graph reads whenever it is replayed, though they may have left the cache."""


@lru_cache(maxsize=256)
def _geometry(keys: tuple[_Key, ...], num_rows: int, device: torch.device) -> _Geometry:
    """Return the tables of these pieces."""
    integers = torch.tensor([_integers(*key) for key in keys], dtype=torch.int64).view(-1)
    edges = torch.tensor([_edges(heads, rows) for heads, rows, *_ in keys], dtype=torch.int64).view(-1, 2)
    first, last = (edges // _TILE).unbind(1)
    counts = last - first + 1
    numbers = torch.repeat_interleave(counts)
    tiles = torch.arange(len(numbers)) - (counts.cumsum(0) - counts - first)[numbers]
    ordered, order = tiles.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(triton.cdiv(num_rows, _TILE) + 1))
    return _Geometry(integers.to(device), starts.to(device, torch.int32), numbers[order].to(device, torch.int32))


def _integers(heads: Heads, rows: Rows, strides: tuple[int, ...], lse_strides: tuple[int, ...]) -> list[int]:
    """Return what the kernel needs to know of a piece, in the order in which it reads it."""
    # (count, step of heads, step of rows, dimension of the values) of the two dimensions that hold heads. The one with
    # the greater step is the outer one; one of a single head must not be it, because its step means nothing.
    by_phase = heads.phases, heads.phase_step if heads.phases > 1 else 1, rows.phase_step, 2
    within_phase = heads.per_phase, heads.step if heads.per_phase > 1 else 1, 0, 4
    inner, outer = sorted([by_phase, within_phase], key=lambda dimension: (dimension[1], dimension[0]))
    integers = [heads.first, *outer[:2], *inner[:2], rows.first, outer[2], inner[2], rows.step, rows.count]
    integers += [rows.segments, rows.segment_step if rows.segments > 1 else _FAR]
    for by_dimension in (strides, lse_strides or strides):
        integers += [by_dimension[n] for n in (0, outer[3], inner[3], 5, 1, 3)]
    return integers


def _edges(heads: Heads, rows: Rows) -> tuple[int, int]:
    """Return the first and the last row of a rectangle."""
    span = (rows.segments - 1) * rows.segment_step + (heads.phases - 1) * rows.phase_step
    return rows.first, rows.first + span + (rows.count - 1) * rows.step


def _with_unit_stride(piece: Piece) -> Piece:
    if piece.values.stride(-1) == 1 or piece.values.shape[-1] == 1:
        return piece
    return Piece(piece.heads, piece.rows, piece.values.contiguous(), piece.lse)


def _is_aligned(values: Tensor) -> bool:
    """Return whether each row begins at a multiple of 16 bytes, so that 16 bytes can be loaded at once."""
    strides = [stride for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True) if size > 1]
    return values.data_ptr() % 16 == 0 and not any(stride * values.itemsize % 16 for stride in strides)
