"""The forward: an online softmax over blocks of keys. See `common` for the arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.common import (
    LN_2,
    bias_of,
    dot,
    is_seen,
    load_rows,
    square_of,
    start_of,
    store_rows,
    unmasked_keys,
)
from longnet_dist.attention.kernels.triton.tuning import tuned


@triton.jit
def attend_keys(
    state: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    I: tl.tensor,
    J: tl.tensor,
    scale: tl.tensor,
    table: tl.tensor,
    bias_runs: tl.tensor,
    CAUSAL: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Update the online softmax (sum of weighted values, maximum, sum of weights) with a block of keys."""
    total, top, denominator = state
    scores = dot(q, tl.trans(load_rows(k, keys, k_stride, J, D, BLOCK_D)), None) * scale
    if BIASED:
        scores += bias_of(table, bias_runs, rows[:, None], keys[None, :], I, J)
    if MASKED:
        scores = tl.where(is_seen(rows[:, None], keys[None, :], J, CAUSAL), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A bias may be -inf for all keys so far.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if BIASED else new_top
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(top - shift)
    values = load_rows(v, keys, v_stride, J, D, BLOCK_D)
    total = dot(weights.to(values.dtype), values, total * shrink[:, None])
    return total, new_top, denominator * shrink + tl.sum(weights, 1)


@tuned("forward")
@triton.jit(do_not_specialize=["result_strides", "I", "J", "H", "R", "bias_runs", "bias_shape"])
def forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    offsets: tl.tensor,
    result_strides: tl.tensor,
    sizes: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    I: tl.tensor,
    J: tl.tensor,
    H: tl.tensor,
    R: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    bias_runs: tl.tensor,
    bias_shape: tl.tensor,
    CAUSAL: tl.constexpr,
    BIASED: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Attend a block of query rows of one head to all keys."""
    blocks = tl.cdiv(I, BLOCK_I)
    # Causal: the blocks that take longest begin first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_I
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = tl.program_id(0) // blocks % H
    group = (h // R).to(tl.int64)
    start, I, J = square_of(b, offsets, I, J, PACKED)
    if PACKED:
        if first >= I:
            return
    rows = first + tl.arange(0, BLOCK_I)
    q += start_of(b, sizes, q_strides) + start * q_strides[3] + group * q_strides[4] + (h % R) * q_strides[5]
    k += start_of(b, sizes, k_strides) + start * k_strides[3] + group * k_strides[4]
    v += start_of(b, sizes, v_strides) + start * v_strides[3] + group * v_strides[4]
    if BIASED:
        bias += ((b % bias_shape[0]) * H + h) * bias_shape[1]
    queries = load_rows(q, rows, q_strides[3], I, D, BLOCK_D)
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_I], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_I], tl.float32)
    full, end = unmasked_keys(first, J, CAUSAL, BLOCK_I, BLOCK_J)
    for j in range(0, full, BLOCK_J):
        total, top, denominator = attend_keys(
            (total, top, denominator), queries, k, v, rows, j + tl.arange(0, BLOCK_J), k_strides[3], v_strides[3],
            I, J, scale, bias, bias_runs, CAUSAL, BIASED, False, D, BLOCK_D,
        )  # fmt: skip
    for j in range(full, end, BLOCK_J):
        total, top, denominator = attend_keys(
            (total, top, denominator), queries, k, v, rows, j + tl.arange(0, BLOCK_J), k_strides[3], v_strides[3],
            I, J, scale, bias, bias_runs, CAUSAL, BIASED, True, D, BLOCK_D,
        )  # fmt: skip
    out += ((b * result_strides[0] + start) * H + h) * D
    store_rows(out, rows, H * D, I, total / denominator[:, None], D, BLOCK_D)
    lse += b * result_strides[2] + h.to(tl.int64) * result_strides[3] + start
    tl.store(lse + rows, (top + tl.log2(denominator)) * LN_2, mask=rows < I)
