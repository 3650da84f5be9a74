"""How the versions of flash-attn are called. All take and return the shapes of `contract.Kernel`.

The sources that were read: flash-attn 2.7.4 to 2.8.3, FlashAttention 3 as of 2.8.0 and as of August 2026, and
flash-attn-4 4.0.0b10 to b36. `tests/unit/attention/flash_signatures.py` lists what they accept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longnet_dist import internals


class Squares(NamedTuple):
    """Squares of different sizes whose rows are packed one after the other; see `contract.PackedKernel`."""

    offsets: Tensor
    longest: int


class Calls(Protocol):
    """The calls of one version: with `squares`, of packed rows."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out, and lse of (b, H, I), or of (H, T) for packed rows."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        squares: Squares | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv)."""


class Version2:
    """flash-attn 2."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        # No dropout, no window, no soft cap, no ALiBi, and no probabilities returned.
        options = 0.0, scale, causal, -1, -1, 0.0, None, False
        if squares is None:
            results = internals.flash_attn(2, "_flash_attn_forward")(q, k, v, *options)
        else:
            function = internals.flash_attn(2, "_flash_attn_varlen_forward")
            results = function(q, k, v, *_twice(squares), *options)
        return results[0], results[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        squares: Squares | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Calls`."""
        grads = _gradients(q, k, v)
        options = 0.0, scale, causal, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled()
        if squares is None:
            internals.flash_attn(2, "_flash_attn_backward")(dout, q, k, v, out, lse, *grads, *options)
        else:
            function = internals.flash_attn(2, "_flash_attn_varlen_backward")
            function(dout, q, k, v, out, lse, *grads, *_twice(squares), *options)
        return grads


class Version3:
    """FlashAttention 3, whose module is `flash_attn_interface`.

    Its parameters are given by position: their names have changed.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        offsets, longest = squares or (None, None)
        before = None, None, None, None, offsets, offsets, None, None, None, longest, longest
        unused = (None,) * 9  # Pages, rotary embeddings, and factors of 8-bit numbers.
        results = internals.flash_attn(3, "_flash_attn_forward")(q, k, v, *before, *unused, scale, causal)
        return results[0], results[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        squares: Squares | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Calls`."""
        grads = _gradients(q, k, v)
        offsets, longest = squares or (None, None)
        internals.flash_attn(3, "_flash_attn_backward")(
            dout, q, k, v, out, lse, offsets, offsets, None, None, longest, longest, *grads, scale, causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


class Version4:
    """flash-attn-4."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        function = internals.flash_attn(4, "_flash_attn_fwd")
        results = function(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_by_name(squares))
        return results[0], results[1]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        squares: Squares | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Calls`."""
        function = internals.flash_attn(4, "_flash_attn_bwd")
        results = function(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, **_by_name(squares),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return results[0], results[1], results[2]


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for (dq, dk, dv), contiguous whatever the strides of q, k and v."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _twice(squares: Squares) -> tuple[Tensor, Tensor, int, int]:
    """Return the offsets of queries and keys, and their most rows."""
    return squares.offsets, squares.offsets, squares.longest, squares.longest


def _by_name(squares: Squares | None) -> dict[str, Any]:
    if squares is None:
        return {}
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), _twice(squares), strict=True))
