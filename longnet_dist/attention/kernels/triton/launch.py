"""Launches of the kernels: strides, grids, and what is computed before and after them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from longnet_dist.attention.kernels.contract import DistanceTable, RectangleBias
from longnet_dist.attention.kernels.triton.attend import forward as forward_kernel
from longnet_dist.attention.kernels.triton.bias_gradient import bias_gradient
from longnet_dist.attention.kernels.triton.key_gradients import key_gradients
from longnet_dist.attention.kernels.triton.query_gradient import query_gradient
from longnet_dist.attention.kernels.triton.tuning import SIZES
from longnet_dist.internals import TRITON_OPTIONS

_DIAGONAL_BLOCK = 32
"""The size of the tiles in which the gradient of a bias is summed."""
_NO_BIAS: tuple[None, tuple[int, int, int], tuple[int, int]] = (None, (0, 0, 0), (1, 0))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call: b rectangles, I queries, J keys, H query heads, of which R share each of G, head dim D.

    If squares are packed, there are b of them with `packed_rows` rows in all, and I and J are those of the longest.
    """

    b: int
    I: int
    J: int
    H: int
    G: int
    R: int
    D: int
    rectangles: tuple[int, int]
    packed_rows: int = 0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, squares: tuple[Tensor, int] | None = None) -> Sizes:
        """Return the sizes of a call with these views."""
        batch, segments, phases, num_queries, num_kv_heads, shared_by, dim = q.shape
        heads = num_kv_heads * shared_by, num_kv_heads, shared_by, dim
        if squares is not None:
            offsets, longest = squares
            return cls(len(offsets) - 1, longest, longest, *heads, (1, 1), num_queries)
        return cls(batch * segments * phases, num_queries, k.shape[3], *heads, (segments, phases))

    def new_queries(self, like: Tensor) -> Tensor:
        """Return memory for out or dq: (b, I, H, D), or (T, H, D) if squares are packed."""
        return like.new_empty(*((self.packed_rows,) if self.packed_rows else (self.b, self.I)), self.H, self.D)

    def new_keys(self, like: Tensor) -> Tensor:
        """Return memory for dk or dv: (b, J, G, D), or (T, G, D) if squares are packed."""
        return like.new_empty(*((self.packed_rows,) if self.packed_rows else (self.b, self.J)), self.G, self.D)

    def new_lse(self, like: Tensor) -> Tensor:
        """Return memory for lse: (b, H, I), or (H, T) if squares are packed."""
        shape = (self.H, self.packed_rows) if self.packed_rows else (self.b, self.H, self.I)
        return like.new_empty(shape, dtype=torch.float32)

    @property
    def result_strides(self) -> tuple[int, int, int, int]:
        """The argument `result_strides` of the kernels."""
        return (0, 0, 0, self.packed_rows) if self.packed_rows else (self.I, self.J, self.H * self.I, self.I)

    def strides(self, *views: Tensor) -> list[tuple[int, ...]]:
        """Return the strides of views for the kernels; those of batches are 0 if squares are packed."""
        if self.packed_rows:
            return [(0, 0, 0, *view.stride()[3:-1]) for view in views]
        return [view.stride()[:-1] for view in views]

    def constants(self, causal: bool, bias: DistanceTable | None) -> dict[str, Any]:
        """Return what kernels are compiled for."""
        size = min(max(triton.next_power_of_2(max(self.I, self.J)), SIZES[0]), SIZES[1])
        flags = {"CAUSAL": causal, "BIASED": bias is not None, "PACKED": self.packed_rows > 0}
        return {**flags, "SIZE": size, **self.dim(), **TRITON_OPTIONS}

    def diagonals(self, causal: bool) -> int:
        """Return the number of diagonals of tiles that have scores."""
        queries, keys = (triton.cdiv(count, _DIAGONAL_BLOCK) for count in (self.I, self.J))
        return queries if causal else queries + keys - 1

    def dim(self) -> dict[str, int]:
        """Return the head dim, and the power of 2 to which it is filled up."""
        return {"D": self.D, "BLOCK_D": max(16, triton.next_power_of_2(self.D))}


def as_views(q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor) -> list[Tensor]:
    """View queries as (B, S, F, I, M, R, D), and keys and values as (B, S, F, J, M, D)."""
    if q.dim() == 7:
        return [q, k, v, *like_q]
    if q.dim() == 3:  # Squares that are packed.
        q, k, v, *like_q = (x[None] for x in (q, k, v, *like_q))  # type: ignore[assignment]
    k, v = (x[:, None, None] for x in (k, v))
    q, *like_q = (x.unflatten(2, (k.shape[4], -1))[:, None, None] for x in (q, *like_q))  # type: ignore[assignment]
    return [q, k, v, *like_q]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    bias: RectangleBias | None = None,
    squares: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; returns out (b, I, H, D) and lse (b, H, I).

    With `squares`, the offsets of packed squares and the most rows of one, q is (T, H, D), k and v are (T, G, D), and
    the results (T, H, D) and (H, T).
    """
    q, k, v = as_views(q, k, v)
    n = Sizes.of(q, k, squares)
    out, lse = n.new_queries(q), n.new_lse(q)
    if not out.numel():
        return out, lse
    table = None if bias is None else bias.by_distance()

    def grid(options: dict[str, int]) -> tuple[int]:
        return (n.b * n.H * triton.cdiv(n.I, options["BLOCK_I"]),)

    with torch.cuda.device_of(q):
        forward_kernel[grid](
            q, k, v, out, lse, _offsets(squares), n.result_strides, n.rectangles, *n.strides(q, k, v),
            n.I, n.J, n.H, n.R, scale * math.log2(math.e), *_arguments(table), **n.constants(causal, table),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    bias: RectangleBias | None = None,
    squares: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq (b, I, H, D), dk and dv (b, J, G, D), and the gradient of the bias's parameters or None.

    With `squares`, shapes are those of `forward`.
    """
    q, k, v, dout, out = as_views(q, k, v, dout, out)
    n = Sizes.of(q, k, squares)
    lse = lse.contiguous()
    dq, dk, dv = n.new_queries(q), n.new_keys(k), n.new_keys(k)
    of_squares = _offsets(squares), n.result_strides
    table = None if bias is None else bias.by_distance()
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_(), None if bias is None else torch.zeros_like(bias.parameters)
    delta = torch.empty_like(lse)
    scores_scale = scale * math.log2(math.e)
    constants, strides = n.constants(causal, table), n.strides(dout, q, k, v)

    def query_grid(options: dict[str, int]) -> tuple[int]:
        return (n.b * n.H * triton.cdiv(n.I, options["BLOCK_I"]),)

    def key_grid(options: dict[str, int]) -> tuple[int]:
        return (n.b * n.G * triton.cdiv(n.J, options["BLOCK_J"]),)

    with torch.cuda.device_of(q):
        query_gradient[query_grid](
            dout, q, k, v, out, lse, delta, dq, *of_squares, n.rectangles, *strides, *n.strides(out),
            n.I, n.J, n.H, n.R, scores_scale, scale, *_arguments(table), **constants,
        )  # fmt: skip
        key_gradients[key_grid](
            dout, q, k, v, lse, delta, dk, dv, *of_squares, n.rectangles, *strides, n.I, n.J, n.G, n.R,
            scores_scale, scale, *_arguments(table), **constants,
        )  # fmt: skip
        if bias is None or table is None:
            return dq, dk, dv, None
        grad_values = torch.zeros_like(table.values)
        ends = [first for first, _ in table.runs[1:]] + [n.J]
        for (first, index), end in zip(table.runs, ends, strict=True):
            run = replace(n, J=end - first)
            sums = torch.empty(
                *(n.b, n.H, run.diagonals(causal), 2 * _DIAGONAL_BLOCK), dtype=torch.float32, device=q.device
            )
            keys = (x[:, :, :, first:end] for x in (k, v))
            bias_gradient[(sums[..., 0].numel(),)](
                dout, q, *keys, lse, delta, sums, n.rectangles, *strides, n.I, run.J, n.H, n.R, scores_scale,
                *_arguments(DistanceTable(table.values, ((0, index - first),))), CAUSAL=causal, BLOCK=_DIAGONAL_BLOCK,
                num_warps=4, num_stages=1, **n.dim(), **TRITON_OPTIONS,
            )  # fmt: skip
            _add_diagonals(grad_values, sums, index - first, run, causal)
    return dq, dk, dv, bias.gradient_of_distances(grad_values)


def _add_diagonals(grad_values: Tensor, sums: Tensor, index: int, n: Sizes, causal: bool) -> None:
    """Add sums (b, H, diagonals of tiles, 2 _DIAGONAL_BLOCK) to the distances, (T, H, N), which they are for."""
    halves = sums.unflatten(0, (-1, len(grad_values))).sum(0).unflatten(-1, (2, _DIAGONAL_BLOCK))
    # The second half of one diagonal of tiles has the distances of the first half of the next one.
    by_distance = pad(halves[..., 0, :], (0, 0, 0, 1)) + pad(halves[..., 1, :], (0, 0, 1, 0))
    lowest = 0 if causal else 1 - n.J  # The lowest i - j.
    first_sum = ((0 if causal else 1 - triton.cdiv(n.J, _DIAGONAL_BLOCK)) - 1) * _DIAGONAL_BLOCK
    count = n.I - lowest
    part = by_distance.flatten(-2)[..., lowest - first_sum :][..., :count]
    grad_values[..., index + lowest :][..., :count] += part


def _offsets(squares: tuple[Tensor, int] | None) -> Tensor | None:
    return None if squares is None else squares[0]


def _arguments(table: DistanceTable | None) -> tuple[Any, tuple[int, int, int], tuple[int, int]]:
    """Return the arguments bias, bias_runs and bias_shape of the kernels."""
    if table is None:
        return _NO_BIAS
    (_, index), *others = table.runs
    gap, other_index = others[0] if others else (0, index)
    return table.values, (gap, index, other_index), (len(table.values), table.values.shape[-1])
