"""The gradient of q. See `common` for the arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.common import (
    LOG2_E,
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
def add_query_gradient(
    grad: tl.tensor,
    q: tl.tensor,
    dout: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log2_sum: tl.tensor,
    delta: tl.tensor,
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
    """Add the gradient of the queries through a block of keys."""
    k_block = load_rows(k, keys, k_stride, J, D, BLOCK_D)
    scores = dot(q, tl.trans(k_block), None) * scale
    if BIASED:
        scores += bias_of(table, bias_runs, rows[:, None], keys[None, :], I, J)
    weights = tl.exp2(scores - log2_sum[:, None])
    if MASKED:
        weights = tl.where(is_seen(rows[:, None], keys[None, :], J, CAUSAL), weights, 0.0)
    dweights = dot(dout, tl.trans(load_rows(v, keys, v_stride, J, D, BLOCK_D)), None)
    dscores = weights * (dweights - delta[:, None])
    return dot(dscores.to(k_block.dtype), k_block, grad)


@tuned("query_gradient")
@triton.jit(do_not_specialize=["result_strides", "I", "J", "H", "R", "bias_runs", "bias_shape"])
def query_gradient(
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    offsets: tl.tensor,
    result_strides: tl.tensor,
    sizes: tl.tensor,
    dout_strides: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    out_strides: tl.tensor,
    I: tl.tensor,
    J: tl.tensor,
    H: tl.tensor,
    R: tl.tensor,
    scale: tl.tensor,
    grad_scale: tl.tensor,
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
    """Compute dq of a block of query rows of one head, and delta, which is the sum of dout * out of each row."""
    blocks = tl.cdiv(I, BLOCK_I)
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
    dout += start_of(b, sizes, dout_strides) + start * dout_strides[3]
    dout += group * dout_strides[4] + (h % R) * dout_strides[5]
    out += start_of(b, sizes, out_strides) + start * out_strides[3]
    out += group * out_strides[4] + (h % R) * out_strides[5]
    k += start_of(b, sizes, k_strides) + start * k_strides[3] + group * k_strides[4]
    v += start_of(b, sizes, v_strides) + start * v_strides[3] + group * v_strides[4]
    if BIASED:
        bias += ((b % bias_shape[0]) * H + h) * bias_shape[1]
    queries = load_rows(q, rows, q_strides[3], I, D, BLOCK_D)
    douts = load_rows(dout, rows, dout_strides[3], I, D, BLOCK_D)
    outs = load_rows(out, rows, out_strides[3], I, D, BLOCK_D)
    deltas = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)
    head = b * result_strides[2] + h.to(tl.int64) * result_strides[3] + start
    tl.store(delta + head + rows, deltas, mask=rows < I)
    log2_sum = tl.load(lse + head + rows, mask=rows < I, other=float("inf")) * LOG2_E
    grad = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    full, end = unmasked_keys(first, J, CAUSAL, BLOCK_I, BLOCK_J)
    for j in range(0, full, BLOCK_J):
        grad = add_query_gradient(
            grad, queries, douts, k, v, log2_sum, deltas, rows, j + tl.arange(0, BLOCK_J), k_strides[3], v_strides[3],
            I, J, scale, bias, bias_runs, CAUSAL, BIASED, False, D, BLOCK_D,
        )  # fmt: skip
    for j in range(full, end, BLOCK_J):
        grad = add_query_gradient(
            grad, queries, douts, k, v, log2_sum, deltas, rows, j + tl.arange(0, BLOCK_J), k_strides[3], v_strides[3],
            I, J, scale, bias, bias_runs, CAUSAL, BIASED, True, D, BLOCK_D,
        )  # fmt: skip
    dq += ((b * result_strides[0] + start) * H + h) * D
    store_rows(dq, rows, H * D, I, grad * grad_scale, D, BLOCK_D)
