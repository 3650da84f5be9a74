"""torch's own flash attention: the CPU kernel, and on CUDA the one that torch is built with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_dist import internals

_MOST_BATCHES = 65_535
"""What CUDA's grid allows in the dimension of batches."""
_CUDA_ALIGNMENT = 16
"""Bytes that CUDA's kernel loads at once: an address or a stride between them ends the process's use of the GPU."""
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, has_bias: bool) -> list[str]:
    """Why this kernel cannot compute this; empty where it can."""
    reasons = []
    if has_bias:
        reasons.append("it has no gradient for a relative bias")
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
            reasons.append("it needs a GPU of compute capability 8.0 or above")
        if dtype not in _CUDA_DTYPES:
            reasons.append(f"on CUDA it takes bfloat16 and float16, not {dtype}")
        if head_dim % 8 or head_dim > 256:
            reasons.append(f"on CUDA it takes head dims that are multiples of 8 up to 256, not {head_dim}")
    elif device.type == "cpu":
        if dtype not in _CPU_DTYPES:
            reasons.append(f"on CPU it takes float64, float32, bfloat16 and float16, not {dtype}")
    else:
        reasons.append(f"torch has no flash attention for {device.type}")
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: Any = None) -> tuple[Tensor, Tensor]:
    """Attention of a rectangle; see `longnet_dist.attention.kernels` for the contract."""
    if q.is_cuda and len(q) > _MOST_BATCHES:
        parts = [forward(*part, causal=causal, scale=scale) for part in _in_batches(q, k, v)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    if q.is_cuda:
        q, k, v = _aligned(q, k, v)
        # Its causal mask is bottom-right aligned, which on a square is the diagonal too.
        out, lse, *_ = internals.cuda_flash_attention(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse
    out, lse = internals.cpu_flash_attention(*_heads_second(q, k, v), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


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
    bias: Any = None,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of a rectangle under the given out and lse; see `longnet_dist.attention.kernels`."""
    if q.is_cuda and len(q) > _MOST_BATCHES:
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
    grads = internals.cpu_flash_attention_backward(*_heads_second(dout, q, k, v, out), lse, 0.0, causal, scale=scale)
    dq, dk, dv = _heads_second(*grads)
    return dq, dk, dv, None


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Copy those of (b, I, H, D) on CUDA whose rows do not begin at multiples of `_CUDA_ALIGNMENT` bytes."""
    return [x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _is_aligned(x: Tensor) -> bool:
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % _CUDA_ALIGNMENT == 0 and not any(step * x.itemsize % _CUDA_ALIGNMENT for step in steps)


def _in_batches(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(_MOST_BATCHES) for x in tensors), strict=True))


def _heads_second(*tensors: Tensor) -> list[Tensor]:
    """(b, I, H, D) as (b, H, I, D), which is how the CPU kernel takes and gives them; and back."""
    return [x.transpose(1, 2) for x in tensors]
