"""What flash kernels on CUDA demand of a call and of its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import KernelRequest

_MAX_BATCH = 65_535
"""The largest batch that CUDA's grid allows."""
_ALIGNMENT = 16
"""The bytes that the kernels load at once. After an unaligned load, the process can no longer use the GPU."""
_DTYPES = (torch.bfloat16, torch.float16)


def problems(request: KernelRequest, max_head_dim: int = 256) -> list[str]:
    """Return the reasons why no flash kernel on CUDA can serve the request; empty if one can."""
    reasons = []
    if request.device.type != "cuda":
        return [f"it runs on CUDA, not on {request.device.type}"]
    if request.bias:
        reasons.append("it has no gradient for a position bias")
    if request.accumulates:
        reasons.append("it returns new tensors")
    if request.capability is not None and request.capability < (8, 0):
        reasons.append("it needs a GPU of compute capability 8.0 or above")
    if request.dtype not in _DTYPES:
        reasons.append(f"on CUDA it takes bfloat16 and float16, not {request.dtype}")
    if request.head_dim % 8 or request.head_dim > max_head_dim:
        reasons.append(
            f"on CUDA it takes head dims that are multiples of 8 up to {max_head_dim}, not {request.head_dim}"
        )
    return reasons


def has_backward_of_version_2(request: KernelRequest) -> bool:
    """Return whether FlashAttention 2, torch's own too, can train with this head dim on this GPU."""
    has_little_shared_memory = request.capability in ((8, 6), (8, 9)) or (request.capability or (0,))[0] == 12
    return not (has_little_shared_memory and 192 < request.head_dim <= 224)


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy those tensors, (..., D) on CUDA, whose rows do not begin at multiples of 16 bytes."""
    return tuple(x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _is_aligned(x: Tensor) -> bool:
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.data_ptr() % _ALIGNMENT == 0 and not any(stride * x.itemsize % _ALIGNMENT for stride in strides)


def in_batches(attend: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call a function on parts of the first dimension that one launch can take, and join its results.

    Usually there is one part, and nothing is copied.
    """
    parts = [attend(*part) for part in zip(*(x.split(_MAX_BATCH) for x in tensors), strict=True)]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x) for x in zip(*parts, strict=True))
