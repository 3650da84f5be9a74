"""cuDNN's attention, which comes with torch for CUDA: made for Hopper and later GPUs.

cuDNN compiles a plan for each new combination of shapes and strides, which takes tenths of a second. So it suits
training, where a few shapes come again and again.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.kernels import eager
from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias
from longnet_dist.attention.kernels.cuda_limits import aligned, in_batches, problems

_OLDEST = 90_000
_MAX_HEAD_DIM = 128


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    reasons = problems(request, _MAX_HEAD_DIM)
    if request.device.type != "cuda":
        return reasons
    if request.variable_lengths:
        reasons.append("it takes rectangles of one size")
    if torch.version.cuda is None or (torch.backends.cudnn.version() or 0) < _OLDEST:
        reasons.append("it needs a torch that is built for CUDA, with cuDNN 9.0 or above")
    if torch.are_deterministic_algorithms_enabled():
        reasons.append("its backward is not deterministic, as torch.use_deterministic_algorithms demands")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    if k.shape[1] == 1:  # cuDNN takes no single key.
        return eager.forward(q, k, v, causal=causal, scale=scale)
    out, lse = in_batches(partial(_forward, causal=causal, scale=scale), q, k, v)
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
    if k.shape[1] == 1:
        return eager.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
    dq, dk, dv = in_batches(partial(_backward, causal=causal, scale=scale), dout, q, k, v, out, lse)
    return dq, dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in aligned(q, k, v))
    out, lse, *_ = internals.cudnn_attention(
        q, k, v, None, None, None, q.shape[2], k.shape[2], True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.view(q.shape[:-1])


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in aligned(dout, q, k, v, out))
    # They are not read where nothing is dropped.
    seed, offset = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    lse = lse.contiguous().view(*lse.shape, *_extra_sizes(q.device, q.dtype))
    grads = internals.cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


@cache
def _extra_sizes(device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the sizes that this torch adds to those of lse, (b, H, I): versions differ, and a small call tells."""
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    lse = internals.cudnn_attention(x, x, x, None, None, None, 64, 64, True, 0.0, False, False, scale=1.0)[1]
    return tuple(lse.shape[3:])
