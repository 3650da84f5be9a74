"""Flash attention of our own in Triton: any strides, float32, any head dim up to 256, and position biases.

The modules of this package import Triton, which not every machine has. So they are imported when the kernel runs.
See docs/decisions/triton-kernel.md.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias

IN_PLACE = True
"""It addresses every dimension of a rectangle by a stride; see `contract.Kernel`."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 256


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    device = request.device
    reasons = []
    if request.variable_lengths and request.bias:
        reasons.append("with a position bias it takes rectangles of one size")
    if request.bias and not request.bias_by_distance:
        reasons.append("it takes biases that depend on the distance of two tokens alone")
    if request.accumulates:
        reasons.append("it returns new tensors")
    if request.dtype not in _DTYPES:
        reasons.append(f"it takes bfloat16, float16 and float32, not {request.dtype}")
    if request.head_dim > _MAX_HEAD_DIM:
        reasons.append(f"it takes head dims up to {_MAX_HEAD_DIM}, not {request.head_dim}")
    if device.type == "cuda":
        if request.capability is not None and request.capability < (8, 0):
            reasons.append("it needs a GPU of compute capability 8.0 or above")
    elif device.type != "cpu":
        reasons.append(f"it runs on CUDA, not on {device.type}")
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("it runs on CUDA; on a CPU it is only interpreted, for tests, with TRITON_INTERPRET=1")
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed: pip install triton")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    from longnet_dist.attention.kernels.triton import launch

    return launch.forward(q, k, v, causal, scale, bias)


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
    from longnet_dist.attention.kernels.triton import launch

    return launch.backward(dout, q, k, v, out, lse, causal, scale, bias)


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend squares of different sizes; see `contract.PackedKernel.forward_packed`."""
    from longnet_dist.attention.kernels.triton import launch

    out, lse = launch.forward(q, k, v, causal, scale, squares=(offsets, longest))
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
    from longnet_dist.attention.kernels.triton import launch

    dq, dk, dv, _ = launch.backward(dout, q, k, v, out, lse.t(), causal, scale, squares=(offsets, longest))
    return dq, dk, dv
