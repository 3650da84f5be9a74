"""The contract of a kernel: dense attention on rectangles. Kernels know no dilation, ranks or groups.

Shapes: b rectangles at once, I queries, J keys, H query heads, G key/value heads, head dim D; H is a
multiple of G. lse is the natural logarithm of the sum of exp(scores), in float32 (float64 for float64).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelRequest:
    """The properties of a call that decide which kernels can serve it.

    Args:
        device: the device of the tensors.
        dtype: the dtype of q, k and v.
        head_dim: D.
        bias: whether scores get a position bias, whose parameters need a gradient.
        bias_by_distance: whether that depends on the distance of two tokens alone, and not on where they are.
        variable_lengths: whether one call holds squares of different sizes; see `PackedKernel`.
        strided_views: whether inputs may have any strides, except that the last is 1.
        accumulates: whether results are merged into existing tensors, in place of new ones. No caller
            needs it yet.
        capability: the compute capability of the GPU, such as (9, 0); by default that of the device, and None if
            this machine has no NVIDIA GPU.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    bias: bool = False
    bias_by_distance: bool = True
    variable_lengths: bool = False
    strided_views: bool = True
    accumulates: bool = False
    capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.capability is None:
            object.__setattr__(self, "capability", _capability(self.device))

    def __str__(self) -> str:
        needs = [name for name in ("bias", "variable_lengths", "accumulates") if getattr(self, name)]
        extra = f" and {', '.join(needs).replace('_', ' ')}" if needs else ""
        return f"{self.dtype} on {self.device.type} with head dim {self.head_dim}{extra}"


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device; None if it is no NVIDIA GPU, or none is here."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


class DistanceTable(NamedTuple):
    """The position bias of b rectangles as a table, for kernels that compute where to look.

    Args:
        values: (T, H, N), float32, T a divisor of b: `values[b % T, h, index + i - j]` is the term of rectangle b,
            query head h, query i and key j.
        runs: one or two pairs (first key, index) in ascending order: the index for this key and those after it.
    """

    values: Tensor
    runs: tuple[tuple[int, int], ...]


class RectangleBias(Protocol):
    """The position bias of a rectangle, from which a kernel gets the bias of a block of query rows."""

    @property
    def parameters(self) -> Tensor:
        """The parameters of the bias, for the heads of each rectangle: (b, H, P)."""

    def of(self, rows: slice) -> Tensor:
        """Return the term added to the scores of these query rows: (b, H, rows, J)."""

    def accumulate_(self, grad_parameters: Tensor, grad_scores: Tensor, rows: slice) -> None:
        """Add the gradient that `grad_scores` (b, H, rows, J) implies to `grad_parameters` (b, H, P), in place."""

    def by_distance(self) -> DistanceTable:
        """Return the bias as a table."""

    def gradient_of_distances(self, grad_values: Tensor) -> Tensor:
        """Return the gradient of the parameters, (T, H, P), from that of the table's values, (T, H, N)."""


class Kernel(Protocol):
    """Dense attention on rectangles, forward and backward. A module with these three functions is a kernel.

    A kernel with a constant `IN_PLACE = True` also takes views of any strides that have three batch dimensions and two
    of heads: q, dout and out (B, S, F, I, M, R, D) and k, v (B, S, F, J, M, D), where b = B S F, G = M and H = M R.
    Its results have the shapes below.
    """

    def unsupported(self, request: KernelRequest) -> list[str]:
        """Return the reasons why this kernel cannot serve the request; empty if it can."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend: q (b, I, H, D) and k, v (b, J, G, D) -> out (b, I, H, D), lse (b, H, I).

        Args:
            q, k, v: the rectangles.
            causal: whether query i sees only keys up to i; then I = J.
            scale: the factor of the scores.
            bias: the term added to the scores, or None.
        """

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
        bias: RectangleBias | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return (dq, dk, dv, gradient of the bias's parameters or None).

        The gradient of the parameters is (b, H, P), or (T, H, P) with T a divisor of b: then it is a sum over the
        rectangles that have the same parameters (see `DistanceTable`).

        `out` and `lse` are those of *all* branches merged. The ordinary flash backward is then the exact
        gradient through the mixing (docs/decisions/exact-mixing-gradient.md).
        """


class PackedKernel(Kernel, Protocol):
    """A kernel that attends squares of different sizes in one call, without a bias: it serves `variable_lengths`.

    The rows of all squares are packed one after the other: T rows in all.
    """

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend: q (T, H, D) and k, v (T, G, D) -> out (T, H, D), lse (T, H).

        Args:
            q, k, v: the packed rows.
            offsets: where each square begins, and the last one ends: int32, on the device of q.
            longest: the most rows of a square.
            causal: whether a query sees only keys up to its own.
            scale: the factor of the scores.
        """

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Tensor,
        longest: int,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv); `out` and `lse` are those of all branches, as in `Kernel.backward`."""
