"""Rows of keys and values gathered by index, both in one launch of a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.internals import TRITON_OPTIONS

_ELEMENTS = 4096
"""The number of elements of k that a program copies, if its rows are not too few or too many."""
_FEWEST_ROWS, _MOST_ROWS = 16, 128


def gather(out: Tensor, k: Tensor, v: Tensor, rows: Tensor, heads: Tensor | None) -> None:
    """Copy rows: out[i, 0, b] = k[b, rows[i], heads[i]], and out[i, 1, b] the same row of v.

    Args:
        out: (n, 2, B, D), with any strides but the last, which is 1.
        k, v: (B, L, G, D), with any strides but the last, which is 1.
        rows, heads: int64, (n,); without heads, that of each row is 0.
    """
    count, _, batch, dim = out.shape
    if not out.numel():
        return
    columns = max(16, triton.next_power_of_2(dim))
    block = min(_MOST_ROWS, max(_FEWEST_ROWS, _ELEMENTS // columns))
    with torch.cuda.device_of(out):
        _gather[(triton.cdiv(count, block) * batch,)](
            out, k, v, rows, heads, out.stride()[:3], k.stride()[:3], v.stride()[:3], count, batch,
            HEADS=heads is not None, D=dim, COLUMNS=columns, ROWS=block, **TRITON_OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "batch"])
def _gather(
    out: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    out_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    count: tl.tensor,
    batch: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Copy a block of rows of one sequence."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    i = (tl.program_id(0) // batch).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = i < count
    mask = inside[:, None] & (columns < D)
    row = tl.load(rows + i, mask=inside, other=0)[:, None]
    k += b * k_strides[0] + row * k_strides[1] + columns
    v += b * v_strides[0] + row * v_strides[1] + columns
    if HEADS:
        head = tl.load(heads + i, mask=inside, other=0)[:, None]
        k += head * k_strides[2]
        v += head * v_strides[2]
    out += i[:, None] * out_strides[0] + b * out_strides[2] + columns
    tl.store(out, tl.load(k, mask=mask, other=0.0), mask=mask)
    tl.store(out + out_strides[1], tl.load(v, mask=mask, other=0.0), mask=mask)
