"""The gradient of the bias by token distance. See `common` for the arguments.

Scores of one distance lie on a diagonal. A program owns a diagonal of tiles and sums each of their diagonals:

    tiles on the main diagonal of tiles        a tile of 4 x 4: its 7 diagonals, by i - j
        0 . . .                                    0 -1 -2 -3
        . 0 . .                                    1  0 -1 -2
        . . 0 .                                    2  1  0 -1
        . . . 0                                    3  2  1  0
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.common import LOG2_E, bias_of, dot, is_seen, load_rows, start_of


@triton.jit(do_not_specialize=["I", "J", "H", "R", "bias_runs", "bias_shape"])
def bias_gradient(
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    sizes: tl.tensor,
    dout_strides: tl.tensor,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum the gradients of the scores of one diagonal of tiles, by distance: grad is (b, H, diagonals, 2 BLOCK)."""
    query_blocks = tl.cdiv(I, BLOCK)
    key_blocks = tl.cdiv(J, BLOCK)
    lowest = 0 if CAUSAL else 1 - key_blocks
    diagonals = query_blocks - lowest
    diagonal = tl.program_id(0) % diagonals + lowest
    b = (tl.program_id(0) // diagonals // H).to(tl.int64)
    h = tl.program_id(0) // diagonals % H
    group = (h // R).to(tl.int64)
    q += start_of(b, sizes, q_strides) + group * q_strides[4] + (h % R) * q_strides[5]
    dout += start_of(b, sizes, dout_strides) + group * dout_strides[4] + (h % R) * dout_strides[5]
    k += start_of(b, sizes, k_strides) + group * k_strides[4]
    v += start_of(b, sizes, v_strides) + group * v_strides[4]
    lse += (b * H + h) * I
    delta += (b * H + h) * I
    bias += ((b % bias_shape[0]) * H + h) * bias_shape[1]
    sums = tl.zeros([2 * BLOCK], tl.float32)
    # The key of each query that lies on diagonal `place` - BLOCK of the tile.
    place = tl.arange(0, 2 * BLOCK)
    column = tl.arange(0, BLOCK)[:, None] + BLOCK - place[None, :]
    is_inside = (column >= 0) & (column < BLOCK)
    column = tl.where(is_inside, column, 0)
    for block in range(tl.maximum(diagonal, 0), tl.minimum(query_blocks, key_blocks + diagonal)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        keys = (block - diagonal) * BLOCK + tl.arange(0, BLOCK)
        queries = load_rows(q, rows, q_strides[3], I, D, BLOCK_D)
        k_block = load_rows(k, keys, k_strides[3], J, D, BLOCK_D)
        scores = dot(queries, tl.trans(k_block), None) * scale
        scores += bias_of(bias, bias_runs, rows[:, None], keys[None, :], I, J)
        log2_sum = tl.load(lse + rows, mask=rows < I, other=float("inf")) * LOG2_E
        weights = tl.exp2(scores - log2_sum[:, None])
        weights = tl.where(is_seen(rows[:, None], keys[None, :], J, CAUSAL), weights, 0.0)
        douts = load_rows(dout, rows, dout_strides[3], I, D, BLOCK_D)
        v_block = load_rows(v, keys, v_strides[3], J, D, BLOCK_D)
        dweights = dot(douts, tl.trans(v_block), None)
        deltas = tl.load(delta + rows, mask=rows < I, other=0.0)
        dscores = weights * (dweights - deltas[:, None])
        sums += tl.sum(tl.where(is_inside, tl.gather(dscores, column, 1), 0.0), 0)
    tl.store(grad + tl.program_id(0).to(tl.int64) * (2 * BLOCK) + place, sums)
