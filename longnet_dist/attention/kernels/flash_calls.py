"""How the versions of flash-attn are called. All take and return the shapes of `contract.Kernel`.

The sources that were read: flash-attn 2.7.4 to 2.8.3, FlashAttention 3 as of 2.8.0 and as of August 2026, and
flash-attn-4 4.0.0b10 to b36. `tests/unit/attention/flash_signatures.py` lists what they accept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longnet_dist import internals

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk and dv."""


class Squares(NamedTuple):
    """Squares of different sizes whose rows are packed one after the other; see `contract.PackedKernel`."""

    offsets: Tensor
    longest: int


class Options(NamedTuple):
    """What a call has beside tensors; `squares` if its rows are packed."""

    causal: bool
    scale: float
    squares: Squares | None = None


class Saved(NamedTuple):
    """What a backward takes."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def new_gradients(self) -> Gradients:
        """Return memory for the gradients, contiguous whatever the strides of q, k and v."""
        return self.q.new_empty(self.q.shape), self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)


class Calls(Protocol):
    """The calls of one version."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Return out, and lse of (b, H, I), or of (H, T) for packed rows."""

    def backward(self, saved: Saved, options: Options) -> Gradients:
        """Return (dq, dk, dv)."""


class Version2:
    """flash-attn 2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        # No dropout, no window, no soft cap, no ALiBi, and no probabilities returned.
        last = 0.0, options.scale, options.causal, -1, -1, 0.0, None, False
        if options.squares is None:
            results = internals.flash_attn(2, "_flash_attn_forward")(q, k, v, *last)
        else:
            results = internals.flash_attn(2, "_flash_attn_varlen_forward")(q, k, v, *_twice(options.squares), *last)
        return results[0], results[1]

    def backward(self, saved: Saved, options: Options) -> Gradients:
        """See `Calls`."""
        grads = saved.new_gradients()
        last = 0.0, options.scale, options.causal, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled()
        if options.squares is None:
            internals.flash_attn(2, "_flash_attn_backward")(*saved, *grads, *last)
        else:
            internals.flash_attn(2, "_flash_attn_varlen_backward")(*saved, *grads, *_twice(options.squares), *last)
        return grads


class Version3:
    """FlashAttention 3, whose module is `flash_attn_interface`.

    Its parameters are given by position: their names have changed.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        offsets, longest = options.squares or (None, None)
        new_keys_and_out = None, None, None, None
        sizes = offsets, offsets, None, None, None, longest, longest
        unused = (None,) * 9  # Pages, rotary embeddings, and factors of 8-bit numbers.
        results = internals.flash_attn(3, "_flash_attn_forward")(
            q, k, v, *new_keys_and_out, *sizes, *unused, options.scale, options.causal
        )
        return results[0], results[1]

    def backward(self, saved: Saved, options: Options) -> Gradients:
        """See `Calls`."""
        grads = saved.new_gradients()
        offsets, longest = options.squares or (None, None)
        internals.flash_attn(3, "_flash_attn_backward")(
            *saved, offsets, offsets, None, None, longest, longest, *grads, options.scale, options.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


class Version4:
    """flash-attn-4."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """See `Calls`."""
        results = internals.flash_attn(4, "_flash_attn_fwd")(q, k, v, return_lse=True, **_by_name(options))
        return results[0], results[1]

    def backward(self, saved: Saved, options: Options) -> Gradients:
        """See `Calls`."""
        dout, q, k, v, out, lse = saved
        deterministic = torch.are_deterministic_algorithms_enabled()
        function = internals.flash_attn(4, "_flash_attn_bwd")
        results = function(q, k, v, out, dout, lse, deterministic=deterministic, **_by_name(options))
        return results[0], results[1], results[2]


def _twice(squares: Squares) -> tuple[Tensor, Tensor, int, int]:
    """Return the offsets of queries and keys, and their most rows."""
    return squares.offsets, squares.offsets, squares.longest, squares.longest


def _by_name(options: Options) -> dict[str, Any]:
    named: dict[str, Any] = {"softmax_scale": options.scale, "causal": options.causal}
    if options.squares is not None:
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        named |= zip(names, _twice(options.squares), strict=True)
    return named
