"""The flash attention that torch is built with, on CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias

_MAX_BATCH = 65_535
"""The largest batch that CUDA's grid allows."""
_ALIGNMENT = 16
"""The bytes that the CUDA kernel loads at once. After an unaligned load, the process can no longer use the GPU."""
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    device, dtype, head_dim = request.device, request.dtype, request.head_dim
    reasons = []
    if request.bias:
        reasons.append("it has no gradient for a position bias")
    if request.variable_lengths and device.type != "cuda":
        reasons.append(f"on {device.type} it takes rectangles of one size")
    if request.accumulates:
        reasons.append("it returns new tensors")
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
            reasons.append("it needs a GPU of compute capability 8.0 or above")
        if dtype not in _CUDA_DTYPES:
            reasons.append(f"on CUDA it takes bfloat16 and float16, not {dtype}")
        if 192 < head_dim <= 224 and _has_little_shared_memory(device):
            reasons.append("on GPUs of compute capability 8.6, 8.9 and 12 it has no backward for head dims 193 to 224")
        if head_dim % 8 or head_dim > 256:
            reasons.append(f"on CUDA it takes head dims that are multiples of 8 up to 256, not {head_dim}")
    elif device.type == "cpu":
        if dtype not in _CPU_DTYPES:
            reasons.append(f"on CPU it takes float64, float32, bfloat16 and float16, not {dtype}")
    else:
        reasons.append(f"torch has no flash attention for {device.type}")
    return reasons


def _has_little_shared_memory(device: torch.device) -> bool:
    """Return whether torch refuses to train with some head dims on this GPU."""
    if not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor) in ((8, 6), (8, 9)) or major == 12


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    if q.is_cuda and len(q) > _MAX_BATCH:
        parts = [forward(*part, causal=causal, scale=scale) for part in _in_batches(q, k, v)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    if q.is_cuda:
        q, k, v = _aligned(q, k, v)
        # The kernel aligns its causal mask to the bottom right, which on a square is the diagonal.
        out, lse, *_ = internals.cuda_flash_attention(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse
    inputs = _transpose_heads(*_as_fast(q, k, v))
    out, lse = internals.cpu_flash_attention(*inputs, 0.0, causal, scale=scale)
    return out.transpose(1, 2).to(q.dtype), lse


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
    if q.is_cuda and len(q) > _MAX_BATCH:
        batches = _in_batches(dout, q, k, v, out, lse)
        parts = [backward(*part, causal=causal, scale=scale)[:3] for part in batches]
        dq, dk, dv = (torch.cat(grads) for grads in zip(*parts, strict=True))
        return dq, dk, dv, None
    if q.is_cuda:
        dout, q, k, v, out = _aligned(dout, q, k, v, out)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = internals.cuda_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            no_dropout, no_dropout.new_empty(0), scale=scale,
        )  # fmt: skip
        return dq, dk, dv, None
    inputs = _transpose_heads(*_as_fast(dout, q, k, v, out))
    grads = internals.cpu_flash_attention_backward(*inputs, lse, 0.0, causal, scale=scale)
    dq, dk, dv = (grad.to(q.dtype) for grad in _transpose_heads(*grads))
    return dq, dk, dv, None


def forward_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend squares of different sizes on CUDA; see `contract.PackedKernel.forward_packed`."""
    q, k, v = _aligned(q, k, v)
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
    dout, q, k, v, out = _aligned(dout, q, k, v, out)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = internals.cuda_flash_attention_backward(
        dout, q, k, v, out, lse.t().contiguous(), offsets, offsets, longest, longest, 0.0, causal,
        no_dropout, no_dropout.new_empty(0), scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _as_fast(*tensors: Tensor) -> list[Tensor]:
    """Return tensors on a CPU in float32 if it computes faster in that than in their dtype."""
    return [x if internals.cpu_is_fast_in(x.dtype) else x.float() for x in tensors]


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Copy those tensors, (b, I, H, D) on CUDA, whose rows do not begin at multiples of `_ALIGNMENT` bytes."""
    return [x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _is_aligned(x: Tensor) -> bool:
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % _ALIGNMENT == 0 and not any(stride * x.itemsize % _ALIGNMENT for stride in strides)


def _in_batches(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(_MAX_BATCH) for x in tensors), strict=True))


def _transpose_heads(*tensors: Tensor) -> list[Tensor]:
    """Turn (b, I, H, D) into (b, H, I, D), which the CPU kernel takes and returns, and back."""
    return [x.transpose(1, 2) for x in tensors]
