"""What the kernels on the GPU share: addresses of rows, the bias, and the mask.

A program owns a block of rows: of one query head in `forward` and `query_gradient`, of one key/value head in
`key_gradients`. It loops over the rows on the other side and writes its results once. So nothing is added
atomically, and equal inputs give equal bits.

All tensors of the caller are addressed by strides (batch, segment, phase, row, key/value head, query head in its
group), so that rectangles need no copy; `sizes` is (segments, phases). Results are contiguous: (b, I, H, D), and
(b, H, I) for lse and delta. Squares of different sizes are PACKED: T rows in all, of which square b has those from
`offsets[b]` to `offsets[b + 1]`; then strides of batches are 0, results are (T, H, D) and (H, T), and I and J are
those of the longest. `result_strides` are the rows of q and of k from one rectangle to the next, and those of lse and
delta from one rectangle and from one head to the next. Scores are in units of log 2, because GPUs compute powers of 2.

A bias is a table of (rectangles with a bias of their own, H, N) by token distance, and `bias_shape` its first and
last size. `bias_runs` is (keys before the gap, index for them, index for others): query i and key j find theirs at
index + i - j.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return a @ b + total in float32; `total` may be None.

    Of float32, tensor cores multiply three pairs of TF32 parts, which together are as exact as float32.
    """
    if INTERPRETED:  # NumPy has no bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def start_of(b: tl.tensor, sizes: tl.tensor, strides: tl.tensor) -> tl.tensor:
    """The offset of the first element of rectangle b."""
    phase = b % sizes[1]
    segment = b // sizes[1] % sizes[0]
    return b // sizes[1] // sizes[0] * strides[0] + segment * strides[1] + phase * strides[2]


@triton.jit
def square_of(b: tl.tensor, offsets: tl.tensor, I: tl.tensor, J: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """The first row of square b among those that are packed, 0 if none are, and the numbers of queries and keys."""
    first = b * 0
    if PACKED:
        first = tl.load(offsets + b).to(tl.int64)
        I = (tl.load(offsets + b + 1) - first).to(tl.int32)
        J = I
    return first, I, J


@triton.jit
def load_rows(
    base: tl.tensor, rows: tl.tensor, stride: tl.tensor, num_rows: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Load rows of D elements as (rows, BLOCK_D), with 0 past the ends."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None]
    if D != BLOCK_D:
        mask = mask & (columns < D)[None, :]
    return tl.load(base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    num_rows: tl.tensor,
    values: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store (rows, BLOCK_D) as rows of D elements."""
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None]
    if D != BLOCK_D:
        mask = mask & (columns < D)[None, :]
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bias_of(
    table: tl.tensor, runs: tl.tensor, queries: tl.tensor, keys: tl.tensor, I: tl.tensor, J: tl.tensor
) -> tl.tensor:
    """Look up the bias of these queries and keys, which broadcast; rows past the end get that of the last one."""
    keys = tl.minimum(keys, J - 1)
    index = tl.where(keys < runs[0], runs[1], runs[2]) - keys
    return tl.load(table + (tl.minimum(queries, I - 1) + index)) * LOG2_E


@triton.jit
def is_seen(queries: tl.tensor, keys: tl.tensor, J: tl.tensor, CAUSAL: tl.constexpr) -> tl.tensor:
    """Whether each query sees each key, which broadcast."""
    seen = (keys < J) & (queries >= 0)
    if CAUSAL:
        seen = seen & (keys <= queries)
    return seen


@triton.jit
def unmasked_keys(
    first: tl.tensor, J: tl.tensor, CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
) -> tl.tensor:
    """The keys that all queries from `first` on see, in whole blocks, and those that any of BLOCK_I queries sees."""
    if CAUSAL:
        return tl.minimum(first + 1, J) // BLOCK_J * BLOCK_J, tl.minimum(first + BLOCK_I, J)
    return J // BLOCK_J * BLOCK_J, J
