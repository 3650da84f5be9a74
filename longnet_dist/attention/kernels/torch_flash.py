"""The flash attention that torch is built with, on CPU and on CUDA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias
from longnet_dist.attention.kernels.cuda_limits import aligned, has_backward_of_version_2, in_batches, problems

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    device, dtype = request.device, request.dtype
    if device.type == "cuda":
        reasons = problems(request)
        if not has_backward_of_version_2(request):
            reasons.append("on GPUs of compute capability 8.6, 8.9 and 12 it has no backward for head dims 193 to 224")
        return reasons
    reasons = []
    if request.bias:
        reasons.append("it has no gradient for a position bias")
    if request.variable_lengths:
        reasons.append(f"on {device.type} it takes rectangles of one size")
    if request.accumulates:
        reasons.append("it returns new tensors")
    if device.type != "cpu":
        reasons.append(f"torch has no flash attention for {device.type}")
    elif dtype not in _CPU_DTYPES:
        reasons.append(f"on CPU it takes float64, float32, bfloat16 and float16, not {dtype}")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    if q.is_cuda:
        out, lse = in_batches(partial(_cuda_forward, causal=causal, scale=scale), q, k, v)
        return out, lse
    inputs = _transpose_heads(*_as_fast(q, k, v))
    out, lse = internals.cpu_flash_attention(*inputs, 0.0, causal, scale=scale)
    return out.transpose(1, 2).to(q.dtype), lse


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = aligned(q, k, v)
    # The kernel aligns its causal mask to the bottom right, which on a square is the diagonal.
    out, lse, *_ = internals.cuda_flash_attention(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
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
    if q.is_cuda:
        attend = partial(_cuda_backward, causal=causal, scale=scale)
        dq, dk, dv = in_batches(attend, dout, q, k, v, out, lse)
        return dq, dk, dv, None
    inputs = _transpose_heads(*_as_fast(dout, q, k, v, out))
    grads = internals.cpu_flash_attention_backward(*inputs, lse, 0.0, causal, scale=scale)
    dq, dk, dv = (grad.to(q.dtype) for grad in _transpose_heads(*grads))
    return dq, dk, dv, None


def _cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = aligned(dout, q, k, v, out)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = internals.cuda_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
        no_dropout, no_dropout.new_empty(0), scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend squares of different sizes on CUDA; see `contract.PackedKernel.forward_packed`."""
    q, k, v = aligned(q, k, v)
    out, lse, *_ = internals.cuda_flash_attention(
        q, k, v, offsets, offsets, longest, longest, 0.0, causal, False, scale=scale
    )
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
    """Compute the gradients on CUDA; see `contract.PackedKernel.backward_packed`."""
    dout, q, k, v, out = aligned(dout, q, k, v, out)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = internals.cuda_flash_attention_backward(
        dout, q, k, v, out, lse.t().contiguous(), offsets, offsets, longest, longest, 0.0, causal,
        no_dropout, no_dropout.new_empty(0), scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _as_fast(*tensors: Tensor) -> list[Tensor]:
    """Return tensors on a CPU in float32 if it computes faster in that than in their dtype."""
    return [x if internals.cpu_is_fast_in(x.dtype) else x.float() for x in tensors]


def _transpose_heads(*tensors: Tensor) -> list[Tensor]:
    """Turn (b, I, H, D) into (b, H, I, D), which the CPU kernel takes and returns, and back."""
    return [x.transpose(1, 2) for x in tensors]
