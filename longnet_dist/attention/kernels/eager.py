"""Plain attention math in blocks of query rows: any device, any floating dtype, any position bias."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import KernelRequest, RectangleBias

_MAX_SCORES = 1 << 24
"""The largest number of scores in memory at once: 64 MiB in float32."""


def unsupported(request: KernelRequest) -> list[str]:
    """Return the reasons why this kernel cannot serve the request; empty if it can."""
    reasons = [] if request.dtype.is_floating_point else [f"{request.dtype} is not a floating dtype"]
    if request.dtype.is_floating_point and request.dtype.itemsize < 2:
        reasons.append(f"torch does not compute in {request.dtype}: convert q, k and v to torch.bfloat16")
    if request.variable_lengths:
        reasons.append("it takes rectangles of one size")
    if request.accumulates:
        reasons.append("it returns new tensors")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: RectangleBias | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see `contract.Kernel.forward`."""
    q_bGRID, k_bGJD, v_bGJD = _upcast(q, k, v)
    out = torch.empty_like(q_bGRID)
    lse = q_bGRID.new_empty(q_bGRID.shape[:-1])
    for rows in _row_blocks(q_bGRID, k_bGJD):
        scores = _scores(q_bGRID, k_bGJD, rows, causal, scale, bias)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = torch.einsum("bgrij,bgjd->bgrid", scores.softmax(-1), v_bGJD)
    return _heads_last(out).to(q.dtype), lse.flatten(1, 2)


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
    q_bGRID, k_bGJD, v_bGJD = _upcast(q, k, v)
    dout_bGRID, out_bGRID = (_upcast(x, k, v)[0] for x in (dout, out))
    lse_bGRI = lse.unflatten(1, q_bGRID.shape[1:3])
    delta = (dout_bGRID * out_bGRID).sum(-1)
    dq, dk, dv = (torch.zeros_like(x) for x in (q_bGRID, k_bGJD, v_bGJD))
    dbias = None if bias is None else torch.zeros_like(bias.parameters, dtype=q_bGRID.dtype)
    for rows in _row_blocks(q_bGRID, k_bGJD):
        p = (_scores(q_bGRID, k_bGJD, rows, causal, scale, bias) - lse_bGRI[..., rows, None]).exp()
        dv += torch.einsum("bgrij,bgrid->bgjd", p, dout_bGRID[..., rows, :])
        dp = torch.einsum("bgrid,bgjd->bgrij", dout_bGRID[..., rows, :], v_bGJD)
        ds = p * (dp - delta[..., rows, None])
        dq[..., rows, :] = torch.einsum("bgrij,bgjd->bgrid", ds, k_bGJD) * scale
        dk += torch.einsum("bgrij,bgrid->bgjd", ds, q_bGRID[..., rows, :]) * scale
        if bias is not None and dbias is not None:
            bias.accumulate_(dbias, ds.flatten(1, 2), rows)
    dq_bIHD = _heads_last(dq).to(q.dtype)
    return dq_bIHD, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), dbias


def _upcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q as (b, G, R, I, D), and k and v as (b, G, J, D), in float32 at least.

    R query heads share a key/value head.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_kv_heads = k.shape[2]
    q_bGRID = q.to(dtype).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
    return q_bGRID, k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)


def _heads_last(x_bGRID: Tensor) -> Tensor:
    return x_bGRID.flatten(1, 2).transpose(1, 2)


def _row_blocks(q_bGRID: Tensor, k_bGJD: Tensor) -> Iterator[slice]:
    *batch, num_rows, _ = q_bGRID.shape
    size = max(1, _MAX_SCORES // max(1, math.prod(batch) * k_bGJD.shape[2]))
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def _scores(
    q_bGRID: Tensor, k_bGJD: Tensor, rows: slice, causal: bool, scale: float, bias: RectangleBias | None
) -> Tensor:
    scores = torch.einsum("bgrid,bgjd->bgrij", q_bGRID[..., rows, :], k_bGJD) * scale
    if bias is not None:
        scores += bias.of(rows).unflatten(1, scores.shape[1:3])
    if causal:
        i = torch.arange(rows.start, rows.stop, device=scores.device)
        j = torch.arange(scores.shape[-1], device=scores.device)
        scores.masked_fill_(j > i[:, None], -torch.inf)
    return scores
