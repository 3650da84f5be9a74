"""The operators of dilated attention, one forward and one backward, which join plan, kernels and exchanges.

One device and many run the same lines: no mesh means one shard and no peers. Each direction is one
operator. So autograd saves q, k, v, out and lse for any number of branches, and torch.compile and
selective checkpointing see a single node.

    forward     start all exchanges            | local blocks, own blocks | keys as they arrive
    backward    start (or restore) exchanges   | local blocks | keys as they arrive, send their gradients
                                               | own blocks | add the gradients that come back

Local blocks are those of whole segments; own blocks are those of this rank's part of shared segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.arguments import SCHEMA, Options, agree
from longnet_dist.attention.call import Call, as_keys, as_queries, retained_elements, unit_stride
from longnet_dist.attention.rows import MergedRows, SummedRows, accumulation_dtype, rectangle
from longnet_dist.distributed.mesh import mesh_of
from longnet_dist.plan.blocks import Heads, OwnBlock, Rows


@torch.library.custom_op(
    "longnet_dist::dilated_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias_parameters, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, bias_parameters: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, retained); `retained` holds the exchanged K and V if the mesh has `keep_kv`, else nothing."""
    if Options(*options).mesh:
        agree(q, k, v, bias_parameters, Options(*options))
    call = Call.of(q, k, bias_parameters, Options(*options))
    q, k, v = (unit_stride(x) for x in (q, k, v))
    exchanges = call.start_exchanges(k, v)
    q_BLGRD = call.by_kv_head(q)
    merged = MergedRows(q_BLGRD)

    def attend(heads: Heads, rows: Rows, key_rows: Sequence[Rows], k_r: Tensor, v_r: Tensor, causal: bool) -> None:
        q_r = as_queries(rectangle(q_BLGRD, heads, rows))
        bias = call.bias_of(heads, rows, key_rows, len(q))
        out, lse = call.kernel.forward(q_r, as_keys(k_r), as_keys(v_r), causal=causal, scale=call.scale, bias=bias)
        merged.merge(heads, rows, out, lse.transpose(1, 2))

    for block in [*call.plan.local, *(block for segment in call.plan.shared for block in segment.own)]:
        own_k, own_v = (rectangle(x, block.heads, block.rows) for x in (k, v))
        attend(block.heads, block.rows, [block.rows], own_k, own_v, call.causal)
    for exchange in exchanges:
        for arrival in exchange.arrivals():
            attend(arrival.heads, arrival.rows, arrival.key_rows, arrival.k, arrival.v, causal=False)
    out, lse = merged.result()
    # A kernel may return the strides of its inputs, and the fakes promise contiguous results.
    out, lse = out.to(q.dtype).contiguous(), lse.contiguous()
    keep = call.mesh is not None and call.mesh.keep_kv and exchanges
    retained = torch.cat([exchange.retained() for exchange in exchanges]) if keep else q.new_empty(0)
    return out.view(q.shape), lse.view(q.shape[:-1]), retained


@torch.library.custom_op(
    "longnet_dist::dilated_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor retained, "
    f"Tensor? bias_parameters, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    retained: Tensor,
    bias_parameters: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias) from the merged out and lse; dbias is empty if there is no bias."""
    call = Call.of(q, k, bias_parameters, Options(*options))
    dout, q, k, v, out = (unit_stride(x) for x in (dout, q, k, v, out))
    exchanges = call.start_exchanges(k, v, retained)
    dq, dk, dv = SummedRows(call.by_kv_head(q)), SummedRows(k), SummedRows(v)
    dbias = q.new_zeros(0 if bias_parameters is None else bias_parameters.shape, dtype=accumulation_dtype(q.dtype))
    by_query = [call.by_kv_head(x) for x in (dout, q, out, lse)]

    def attend(
        heads: Heads, rows: Rows, key_rows: Sequence[Rows], k_r: Tensor, v_r: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        dout_r, q_r, out_r, lse_r = (as_queries(rectangle(x, heads, rows)) for x in by_query)
        dq_r, dk_r, dv_r, dbias_r = call.kernel.backward(
            dout_r,
            q_r,
            as_keys(k_r),
            as_keys(v_r),
            out_r,
            lse_r.transpose(1, 2).contiguous(),
            causal=causal,
            scale=call.scale,
            bias=call.bias_of(heads, rows, key_rows, len(q)),
        )
        dq.add(heads, rows, dq_r)
        if dbias_r is not None:
            target = call.bias_parameters_of(dbias, heads)
            target += dbias_r.unflatten(0, (-1, heads.phases)).sum(0).view(target.shape)
        return dk_r.reshape(k_r.shape), dv_r.reshape(v_r.shape)

    def attend_own(block: OwnBlock) -> None:
        own_k, own_v = (rectangle(x, block.heads, block.rows) for x in (k, v))
        grads = attend(block.heads, block.rows, [block.rows], own_k, own_v, call.causal)
        for total, grad in zip((dk, dv), grads, strict=True):
            total.add(block.heads, block.rows, grad)

    for block in call.plan.local:
        attend_own(block)
    for exchange in exchanges:
        for arrival in exchange.arrivals():
            dk_r, dv_r = attend(arrival.heads, arrival.rows, arrival.key_rows, arrival.k, arrival.v, causal=False)
            exchange.add_gradients(arrival, dk_r, dv_r)
        exchange.start_return()
    for segment in call.plan.shared:
        for block in segment.own:
            attend_own(block)
    for exchange in exchanges:
        for heads, rows, dk_r, dv_r in exchange.returned():
            dk.add(heads, rows, dk_r)
            dv.add(heads, rows, dv_r)
    dq_BLHD, dk_BLGD, dv_BLGD = (total.result().to(q.dtype).contiguous() for total in (dq, dk, dv))
    return dq_BLHD.view(q.shape), dk_BLGD, dv_BLGD, dbias


@forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias_parameters: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    mesh = mesh_of(Options(*options).mesh)
    keep = mesh is not None and mesh.keep_kv
    elements = retained_elements(Options(*options).plan(mesh.shard, k.shape[2]), k) if mesh and keep else 0
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse, q.new_empty(elements)


@backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    retained: Tensor,
    bias_parameters: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    shape = 0 if bias_parameters is None else bias_parameters.shape
    dbias = q.new_empty(shape, dtype=accumulation_dtype(q.dtype))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbias
