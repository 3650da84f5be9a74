"""The gradients of k and v. See `common` for the arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.common import (
    LOG2_E,
    bias_of,
    dot,
    load_rows,
    square_of,
    start_of,
    store_rows,
)
from longnet_dist.attention.kernels.triton.tuning import tuned


@triton.jit
def add_key_gradients(
    grads: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    q_stride: tl.tensor,
    dout_stride: tl.tensor,
    I: tl.tensor,
    J: tl.tensor,
    scale: tl.tensor,
    table: tl.tensor,
    bias_runs: tl.tensor,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add the gradients of the keys and values through a block of query rows; all blocks are (keys, rows)."""
    dk, dv = grads
    queries = load_rows(q, rows, q_stride, I, D, BLOCK_D)
    scores = dot(k, tl.trans(queries), None) * scale
    if BIASED:
        scores += bias_of(table, bias_runs, rows[None, :], keys[:, None], I, J)
    # Rows past the last get weights of 0. Keys past the last need no mask, because their gradients are not stored.
    log2_sum = tl.load(lse + rows, mask=rows < I, other=float("inf")) * LOG2_E
    weights = tl.exp2(scores - log2_sum[None, :])
    if MASKED:
        weights = tl.where(keys[:, None] <= rows[None, :], weights, 0.0)
    douts = load_rows(dout, rows, dout_stride, I, D, BLOCK_D)
    dv = dot(weights.to(douts.dtype), douts, dv)
    dweights = dot(v, tl.trans(douts), None)
    deltas = tl.load(delta + rows, mask=rows < I, other=0.0)
    dscores = weights * (dweights - deltas[None, :])
    dk = dot(dscores.to(queries.dtype), queries, dk)
    return dk, dv


@tuned("key_gradients")
@triton.jit(do_not_specialize=["result_strides", "I", "J", "G", "R", "bias_runs", "bias_shape"])
def key_gradients(
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    offsets: tl.tensor,
    result_strides: tl.tensor,
    sizes: tl.tensor,
    dout_strides: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    I: tl.tensor,
    J: tl.tensor,
    G: tl.tensor,
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
    """Compute dk and dv of a block of rows of one key/value head, whose query heads take turns."""
    blocks = tl.cdiv(J, BLOCK_J)
    first = tl.program_id(0) % blocks * BLOCK_J
    b = (tl.program_id(0) // blocks // G).to(tl.int64)
    group = (tl.program_id(0) // blocks % G).to(tl.int64)
    start, I, J = square_of(b, offsets, I, J, PACKED)
    if PACKED:
        if first >= J:
            return
    keys = first + tl.arange(0, BLOCK_J)
    q += start_of(b, sizes, q_strides) + start * q_strides[3] + group * q_strides[4]
    dout += start_of(b, sizes, dout_strides) + start * dout_strides[3] + group * dout_strides[4]
    k += start_of(b, sizes, k_strides) + start * k_strides[3] + group * k_strides[4]
    v += start_of(b, sizes, v_strides) + start * v_strides[3] + group * v_strides[4]
    k_block = load_rows(k, keys, k_strides[3], J, D, BLOCK_D)
    v_block = load_rows(v, keys, v_strides[3], J, D, BLOCK_D)
    dk_block = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv_block = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    lowest = 0
    masked_end = 0
    if CAUSAL:  # Earlier rows see none of the keys, rows from `masked_end` on see all.
        lowest = first // BLOCK_I * BLOCK_I
        masked_end = tl.minimum(tl.cdiv(first + BLOCK_J - 1, BLOCK_I) * BLOCK_I, I)
    for r in range(0, R):
        head = b * result_strides[2] + (group * R + r) * result_strides[3] + start
        table = bias
        if BIASED:
            table = bias + ((b % bias_shape[0]) * G * R + group * R + r) * bias_shape[1]
        if CAUSAL:
            for i in range(lowest, masked_end, BLOCK_I):
                dk_block, dv_block = add_key_gradients(
                    (dk_block, dv_block), k_block, v_block, q + r * q_strides[5], dout + r * dout_strides[5],
                    lse + head, delta + head, i + tl.arange(0, BLOCK_I), keys, q_strides[3], dout_strides[3],
                    I, J, scale, table, bias_runs, BIASED, True, D, BLOCK_D,
                )  # fmt: skip
        for i in range(masked_end, I, BLOCK_I):
            dk_block, dv_block = add_key_gradients(
                (dk_block, dv_block), k_block, v_block, q + r * q_strides[5], dout + r * dout_strides[5],
                lse + head, delta + head, i + tl.arange(0, BLOCK_I), keys, q_strides[3], dout_strides[3],
                I, J, scale, table, bias_runs, BIASED, False, D, BLOCK_D,
            )  # fmt: skip
    result = ((b * result_strides[1] + start) * G + group) * D
    store_rows(dk + result, keys, G * D, J, dk_block * grad_scale, D, BLOCK_D)
    store_rows(dv + result, keys, G * D, J, dv_block, D, BLOCK_D)
