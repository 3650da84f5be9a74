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

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.arguments import SCHEMA, Options, agree, offsets_problem
from longnet_dist.attention.call import Call, HeadTable, plan_of, retained_sizes, unit_stride
from longnet_dist.attention.merging import merged_rows, summed_rows
from longnet_dist.attention.rows import accumulation_dtype, as_keys, as_queries, packing, pieces, rectangle
from longnet_dist.plan.blocks import OwnBlock, Rows


def _without_autocast(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Switch autocast off inside an operator, whose kernels choose the dtypes that they compute in."""

    @wraps(operator)
    def call(first: Tensor, *args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return operator(first, *args)

    return call


@torch.library.custom_op(
    "longnet_dist::dilated_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias_parameters, Tensor? cu_seqlens, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)
@_without_autocast
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, bias_parameters: Tensor | None, cu_seqlens: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, retained); `retained` holds what exchanges keep for the backward, which may be nothing."""
    problem = offsets_problem(q, cu_seqlens, Options(*options))
    if Options(*options).mesh:
        agree(q, k, v, bias_parameters, cu_seqlens, Options(*options), problem)
    elif problem:
        raise ValueError(problem)
    call = Call.of(q, k, bias_parameters, cu_seqlens, Options(*options))
    q, k, v = (unit_stride(x) for x in (q, k, v))
    q_BLGRD = call.by_kv_head(q)
    merged = merged_rows(q_BLGRD, call.plan.first_shared)
    exchanges, collectives = call.exchanges()
    for exchange in exchanges:
        exchange.start(q_BLGRD, k, v)
    collectives.launch()

    def attend(
        heads: HeadTable, query_rows: Sequence[Rows], key_rows: Sequence[Rows], causal: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        q_r, k_r, v_r = tensors
        bias = call.bias_of(heads, query_rows, key_rows, k_r.shape[:-3].numel())
        out, lse = call.kernel.forward(q_r, k_r, v_r, causal=causal, scale=call.scale, bias=bias)
        return out, lse.transpose(1, 2)

    if (packed := call.packed_kernel) is not None:
        for group in call.plan.groups:
            packs = packing(group, len(q), q.device)
            q_p, k_p, v_p = (packs.pack(x) for x in (q_BLGRD, k, v))
            out, lse = packed.forward_packed(
                q_p.flatten(1, 2), k_p, v_p, packs.offsets, packs.longest, causal=call.causal, scale=call.scale
            )
            out, lse = out.reshape(q_p.shape), lse.reshape(q_p.shape[:-1])
            out, lse = (x.unflatten(0, (len(q), -1)) for x in (out, lse))
            for block, (first, end) in zip(group.blocks, packs.parts, strict=True):
                merged.merge(group.branch, block.heads, block.rows, out[:, first:end], lse[:, first:end])
    for block in [*call.plan.local, *call.plan.own] if packed is None else ():
        for heads, rows in pieces(block.heads, block.rows, call.in_place):
            q_r, *k_v = (rectangle(x, heads, rows) for x in (q_BLGRD, k, v))
            q_k_v = as_queries(q_r, call.in_place), *(as_keys(x, call.in_place) for x in k_v)
            out, lse = attend(heads.table, [rows], [rows], call.causal, *q_k_v)
            del q_k_v  # These may be copies, which take memory.
            merged.merge(block.branch, heads, rows, out, lse)
            del out, lse
    for exchange in exchanges:
        for a in exchange.arrivals():
            exchange.put(a, *attend(a.heads, a.query_rows, a.key_rows, a.causal, a.q, a.k, a.v))
        exchange.start_return()
    collectives.launch()
    for exchange in exchanges:
        for result in exchange.returned():
            merged.merge(*result)
    out, lse = merged.result()
    # A kernel may return the strides of its inputs, and the fakes promise contiguous results.
    out, lse = out.to(q.dtype).contiguous(), lse.contiguous()
    sizes = retained_sizes(call.plan, q, k, Options(*options), cu_seqlens)
    kept = [exchange.retained() for exchange, size in zip(exchanges, sizes, strict=True) if size is not None]
    return out.view(q.shape), lse.view(q.shape[:-1]), torch.cat(kept) if kept else q.new_empty(0)


@torch.library.custom_op(
    "longnet_dist::dilated_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? retained, "
    f"Tensor? bias_parameters, Tensor? cu_seqlens, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@_without_autocast
def backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    retained: Tensor | None,
    bias_parameters: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias) from the merged out and lse; dbias is empty if there is no bias.

    `retained` is what the forward returned; None if the exchanges must send all again.
    """
    call = Call.of(q, k, bias_parameters, cu_seqlens, Options(*options))
    dout, q, k, v, out = (unit_stride(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (summed_rows(x, call.plan.first_shared) for x in (call.by_kv_head(q), k, v))
    dbias = q.new_zeros(0 if bias_parameters is None else bias_parameters.shape, dtype=accumulation_dtype(q.dtype))
    q_BLGRD, *results = (call.by_kv_head(x) for x in (q, dout, out, lse))
    exchanges, collectives = call.exchanges()
    sizes = retained_sizes(call.plan, q, k, Options(*options), cu_seqlens)
    for exchange, size in zip(exchanges, sizes, strict=True):
        if size is not None and retained is not None:
            kept, retained = retained.split([size, retained.numel() - size])
            exchange.restore(kept)
        exchange.start_backward(q_BLGRD, k, v, (results[0], results[1], results[2]))
    collectives.launch()

    def attend(
        heads: HeadTable, query_rows: Sequence[Rows], key_rows: Sequence[Rows], causal: bool, *tensors: Tensor
    ) -> list[Tensor]:
        q_r, k_r, v_r, dout_r, out_r, lse_r = tensors
        bias = call.bias_of(heads, query_rows, key_rows, k_r.shape[:-3].numel())
        lse_r = lse_r.transpose(1, 2).contiguous()
        *grads, dbias_r = call.kernel.backward(
            dout_r, q_r, k_r, v_r, out_r, lse_r, causal=causal, scale=call.scale, bias=bias
        )
        if dbias_r is not None:
            call.add_bias_gradient(dbias, heads, dbias_r)
        return grads

    def attend_own(block: OwnBlock) -> None:
        for heads, rows in pieces(block.heads, block.rows, call.in_place):
            queries = [as_queries(rectangle(x, heads, rows), call.in_place) for x in (q_BLGRD, *results[:2])]
            k_v = (as_keys(rectangle(x, heads, rows), call.in_place) for x in (k, v))
            lse_r = as_queries(rectangle(results[2], heads, rows))
            grads = attend(heads.table, [rows], [rows], call.causal, queries[0], *k_v, *queries[1:], lse_r)
            del queries  # These may be copies, which take memory.
            for total in (dq, dk, dv):
                total.add(block.branch, heads, rows, grads.pop(0))

    if (packed := call.packed_kernel) is not None:
        for group in call.plan.groups:
            packs = packing(group, len(q), q.device)
            q_p, dout_p, out_p, lse_p, k_p, v_p = (packs.pack(x) for x in (q_BLGRD, *results, k, v))
            q_h, dout_h, out_h, lse_h = (x.flatten(1, 2) for x in (q_p, dout_p, out_p, lse_p))
            packed_grads = packed.backward_packed(
                dout_h, q_h, k_p, v_p, out_h, lse_h, packs.offsets, packs.longest, causal=call.causal, scale=call.scale
            )
            for total, of_group, like in zip((dq, dk, dv), packed_grads, (q_p, k_p, v_p), strict=True):
                by_sequence = of_group.reshape(like.shape).unflatten(0, (len(q), -1))
                for block, (first, end) in zip(group.blocks, packs.parts, strict=True):
                    total.add(group.branch, block.heads, block.rows, by_sequence[:, first:end])
    for block in call.plan.local if packed is None else ():
        attend_own(block)
    for exchange in exchanges:
        for a in exchange.arrivals():
            assert a.backward is not None
            exchange.put_gradients(a, *attend(a.heads, a.query_rows, a.key_rows, a.causal, a.q, a.k, a.v, *a.backward))
        exchange.start_return()
    collectives.launch()
    for block in call.plan.own if packed is None else ():
        attend_own(block)
    for exchange in exchanges:
        for branch, heads, rows, *parts in exchange.returned_gradients():
            for total, grad in zip((dq, dk, dv), parts, strict=True):
                if grad is not None:
                    total.add(branch, heads, rows, grad)
    dq_BLHD, dk_BLGD, dv_BLGD = (total.result().to(q.dtype).contiguous() for total in (dq, dk, dv))
    return dq_BLHD.view(q.shape), dk_BLGD, dv_BLGD, dbias


@forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias_parameters: Tensor | None, cu_seqlens: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    elements = 0
    # Without a mesh, sizes may be symbols, and documents are unknown: there is no plan of either.
    if Options(*options).mesh and cu_seqlens is None:
        sizes = retained_sizes(plan_of(q, k, Options(*options)), q, k, Options(*options), None)
        elements = sum(size or 0 for size in sizes)
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
    retained: Tensor | None,
    bias_parameters: Tensor | None,
    cu_seqlens: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    shape = 0 if bias_parameters is None else bias_parameters.shape
    dbias = q.new_empty(shape, dtype=accumulation_dtype(q.dtype))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbias
