"""FlashAttention as its users install it: flash-attn 2, FlashAttention 3 or flash-attn-4.

The version that is taken is the first of `_ORDER` that is installed and serves the request.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias
from longnet_dist.attention.kernels.cuda_limits import aligned, has_backward_of_version_2, in_batches, problems
from longnet_dist.attention.kernels.flash_calls import Calls, Options, Saved, Squares, Version2, Version3, Version4


class _Version(NamedTuple):
    calls: Calls
    package: str


_VERSIONS = {
    2: _Version(Version2(), "flash-attn>=2.7.4"),
    3: _Version(Version3(), "FlashAttention 3"),
    4: _Version(Version4(), "flash-attn-4"),
}
_ORDER = {8: (2,), 9: (3, 4, 2), 10: (4, 2), 11: (4, 2), 12: (2, 4)}
"""For each major compute capability the versions that run on it, fastest first, as their authors say.

flash-attn-4 has no backward for 8, and FlashAttention 3 is for 9.
"""


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    return problems(request) or _version(request)[1]


def version(request: KernelRequest) -> int | None:
    """Return the version that serves a request; None if none does."""
    return None if problems(request) else _version(request)[0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    attend = partial(_calls(q).forward, options=Options(causal, scale))
    out, lse = in_batches(lambda *part: attend(*aligned(*part)), q, k, v)
    return out, lse


def backward(
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
    """Compute the gradients; see `contract.Kernel.backward`."""
    attend = partial(_calls(q).backward, options=Options(causal, scale))
    dq, dk, dv = in_batches(lambda *part: attend(_saved(*part)), dout, q, k, v, out, lse)
    return dq, dk, dv, None


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend squares of different sizes; see `contract.PackedKernel.forward_packed`."""
    q, k, v = aligned(q, k, v)
    out, lse = _calls(q).forward(q, k, v, Options(causal, scale, Squares(offsets, longest)))
    return out, lse.t()


def backward_packed(
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
    """Compute the gradients; see `contract.PackedKernel.backward_packed`."""
    saved = _saved(dout, q, k, v, out, lse.t())
    return _calls(q).backward(saved, Options(causal, scale, Squares(offsets, longest)))


def _saved(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Saved:
    dout, q, k, v, out = aligned(dout, q, k, v, out)
    return Saved(dout, q, k, v, out, lse.contiguous())


def _calls(q: Tensor) -> Calls:
    chosen, reasons = _version(KernelRequest(q.device, q.dtype, q.shape[-1]))
    if chosen is None:
        raise ImportError("; ".join(reasons))
    return _VERSIONS[chosen].calls


def _version(request: KernelRequest) -> tuple[int | None, list[str]]:
    """Return the version that serves a request that some version serves, or the reasons why each cannot."""
    if request.capability is None:
        return None, ["it needs an NVIDIA GPU, and finds none here"]
    major, reasons = request.capability[0], []
    for number in _ORDER.get(major, (2,)):
        reason = internals.problem_of_flash_attn(number) or _limit(number, request)
        if reason is None:
            return number, []
        reasons.append(f"{_VERSIONS[number].package} {reason}")
    return None, reasons


def _limit(number: int, request: KernelRequest) -> str | None:
    assert request.capability is not None
    head_dim, (major, minor) = request.head_dim, request.capability
    if number == 2 and not has_backward_of_version_2(request):
        return f"has no backward for head dim {head_dim} on compute capability {major}.{minor}"
    if number == 4 and major > 9 and head_dim > 128 and (head_dim != 256 or major == 12):
        return f"takes head dims up to 128{' and 256' * (major < 12)} on compute capability {major}.{minor}"
    return None
