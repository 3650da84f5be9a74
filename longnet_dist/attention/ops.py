"""dilated_attention(): where pattern, plan, kernels and communication meet.

One device and many run the same lines: no mesh means one shard and no peers. Forward and backward
are one operator each, so that autograd keeps q, k, v, out and lse whatever the number of branches,
and torch.compile and selective checkpointing see a single node.

    forward    start all gathers of kept K, V | local branches, own chunk | gathered keys as they come
    backward   start all gathers again        | local branches | gathered keys, start reduce-scatters
               (or use those kept)            | own chunk      | add what the others computed of dK, dV
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from longnet_dist import internals
from longnet_dist.attention.arguments import SCHEMA, Options, agree, problem
from longnet_dist.attention.call import Call, gathered_keys, of_keys, of_queries, place_gathered, unit_stride
from longnet_dist.attention.rows import MergedRows, SummedRows, accumulation_dtype, rectangle
from longnet_dist.distributed.heads import head_shard
from longnet_dist.distributed.mesh import SequenceMesh, mesh_of, refuse
from longnet_dist.plan.blocks import Heads, OwnBlock, Rows
from longnet_dist.plan.pattern import Pattern

_NO_FORWARD_MODE = (
    "a forward-mode derivative of dilated_attention was asked for (by torch.func.jvp, linearize, jacfwd or hessian, or "
    "torch.autograd.forward_ad), and it has only reverse mode: use torch.func.vjp, torch.func.jacrev or "
    "torch.autograd.grad, or dense_reference, which has every derivative and suits short sequences"
)
_NO_SECOND_DERIVATIVE = (
    "a second derivative of dilated_attention was asked for (a gradient of its gradient, which "
    "torch.autograd.functional.jvp and hvp take too), and it has only first ones: use dense_reference, which has every "
    "derivative and suits short sequences"
)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = False,
    mesh: SequenceMesh | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    rel_bias: Tensor | None = None,
    rel_bias_max_distance: int = 128,
    return_lse: bool = False,
) -> Any:
    """Dilated attention (LongNet, arXiv 2307.02486, section 2.2), on one device or over a mesh; exact.

    Args:
        q: (B, N, H, D); with a mesh (B, L, H, D), this rank's rows [mesh.shard.start, mesh.shard.stop).
        k, v: (B, N or L, G, D), of q's dtype; H a multiple of G: query heads h G // H share a head. All three may be
            DTensors of one placement, of which heads (tensor parallelism) or the batch are sharded.
        pattern: the branches. With a mesh, the mesh's own.
        causal: a query sees only keys at or before it.
        mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
        scale: of the scores; 1 / sqrt(D) by default.
        kernel: "auto", or one of `longnet_dist.attention.kernels.KERNELS`; a named one never falls back.
        rel_bias: (buckets, H), T5's learned relative bias by token distance; see `longnet_dist.attention.bias`.
            Over a mesh its gradient on a rank is of that rank's queries: sum it, as any parameter's.
        rel_bias_max_distance: tokens; where its buckets end.
        return_lse: also return log(sum(exp(scores))) over all branches, natural log, differentiable.

    Returns:
        out, of q's shape, dtype and placement: 0 for rows that no branch covers. With `return_lse` (out, lse),
        lse (B, N or L, H) in float32 (float64 for float64), -inf for such rows.

    Raises:
        ValueError: for shapes, dtypes or a kernel that cannot work; over a mesh on every rank, also
            where ranks disagree, on the first such call. For derivatives in forward mode, and second ones.
        RuntimeError: where a rank of the mesh is gone, or does not come within the mesh's timeout.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> dilated_attention(q, k, v, Pattern((16, 64), (1, 4)), causal=True).shape
        torch.Size([1, 100, 4, 8])
    """
    if mesh is not None and not isinstance(mesh, SequenceMesh):
        raise ValueError(f"mesh is {mesh!r}; it must be a longnet_dist.SequenceMesh, or None")
    sharded = head_shard(q, k, v)
    if isinstance(sharded, str):
        refuse(sharded, mesh)
    if sharded is not None:
        q, k, v = (x.to_local() for x in (q, k, v))  # type: ignore[attr-defined]
    if not isinstance(pattern, Pattern):
        refuse(f"pattern is {pattern!r}; it must be a longnet_dist.Pattern", mesh)
    if q.dim() != 4:
        refuse(f"q is {tuple(q.shape)}; it must be (B, N, H, D)", mesh)
    options = Options(
        list(pattern.segment_lengths),
        list(pattern.dilation_rates),
        pattern.head_phases,
        causal,
        1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale),
        kernel,
        rel_bias_max_distance,
        0 if sharded is None else sharded.first,
        0 if sharded is None else sharded.total,
        0 if mesh is None else mesh.handle,
    )
    # Over a mesh the operator itself checks, where the ranks compare what they were given.
    if mesh is None and (found := problem(q, k, v, rel_bias, options)):
        raise ValueError(found)
    out, lse, _ = _differentiable(_Attention, _forward_op, q, k, v, rel_bias, *options)
    if sharded is not None:
        out, lse = sharded.whole(out), sharded.whole(lse)
    return (out, lse) if return_lse else out


@torch.library.custom_op(
    "longnet_dist::dilated_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? rel_bias, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _forward_op(q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, gathered): `gathered` holds every branch's keys and values where the mesh keeps them, else nothing."""
    if Options(*rest).mesh:
        agree(q, k, v, rel_bias, Options(*rest))
    call = Call.of(q, k, rel_bias, Options(*rest))
    q, k, v = (unit_stride(x) for x in (q, k, v))
    gathers = call.start_gathers(k, v)
    q_BLGRD = call.by_kv_head(q)
    merged = MergedRows(q_BLGRD)

    def attend(heads: Heads, rows: Rows, keys: Sequence[Rows], k_v: Sequence[Tensor], causal: bool) -> None:
        q_r = of_queries(rectangle(q_BLGRD, heads, rows))
        out, lse = call.kernel.forward(
            q_r, *map(of_keys, k_v), causal=causal, scale=call.scale, bias=call.bias(heads, rows, keys, len(q))
        )
        merged.merge(heads, rows, out, lse.transpose(1, 2))

    for block in [*call.plan.local, *(block for segment in call.plan.shared for block in segment.own)]:
        own = [rectangle(x, block.heads, block.rows) for x in (k, v)]
        attend(block.heads, block.rows, [block.rows], own, call.causal)
    kept = []
    for segment, pending in zip(call.plan.shared, gathers, strict=True):
        gathered = pending.wait()
        for remote in segment.remote:
            attend(remote.heads, remote.rows, remote.key_rows, gathered_keys(gathered, remote), causal=False)
        kept.append(gathered.flatten())
    out, lse = merged.result()
    keeps = call.mesh is not None and call.mesh.keep_kv and kept
    # A kernel may give the strides of what it was given, and the fakes promise contiguous results.
    out, lse = out.to(q.dtype).contiguous(), lse.contiguous()
    return out.view(q.shape), lse.view(q.shape[:-1]), torch.cat(kept) if keeps else q.new_empty(0)


@torch.library.custom_op(
    "longnet_dist::dilated_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gathered, Tensor? rel_bias, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gathered: Tensor,
    rel_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, drel_bias), given the merged out and lse; drel_bias is empty where there is no bias."""
    call = Call.of(q, k, rel_bias, Options(*rest))
    dout, q, k, v, out = (unit_stride(x) for x in (dout, q, k, v, out))
    gathers = call.start_gathers(k, v, gathered)
    dq, dk, dv = SummedRows(call.by_kv_head(q)), SummedRows(k), SummedRows(v)
    dbias = q.new_zeros(0 if rel_bias is None else rel_bias.shape, dtype=accumulation_dtype(q.dtype))
    given = [call.by_kv_head(x) for x in (dout, q, out, lse)]

    def attend(heads: Heads, rows: Rows, keys: Sequence[Rows], k_v: Sequence[Tensor], causal: bool) -> list[Tensor]:
        dout_r, q_r, out_r, lse_r = (of_queries(rectangle(x, heads, rows)) for x in given)
        dq_r, dk_r, dv_r, dtable = call.kernel.backward(
            dout_r,
            q_r,
            *map(of_keys, k_v),
            out_r,
            lse_r.transpose(1, 2).contiguous(),
            causal=causal,
            scale=call.scale,
            bias=call.bias(heads, rows, keys, len(q)),
        )
        dq.add(heads, rows, dq_r)
        if dtable is not None:
            target = call.bias_of(dbias, heads)
            target += dtable.unflatten(0, (-1, heads.phases)).sum(0).view(target.shape)
        return [grad.reshape(x.shape) for grad, x in zip((dk_r, dv_r), k_v, strict=True)]

    def attend_own(block: OwnBlock) -> None:
        own = [rectangle(x, block.heads, block.rows) for x in (k, v)]
        grads = attend(block.heads, block.rows, [block.rows], own, call.causal)
        for total, grad in zip((dk, dv), grads, strict=True):
            total.add(block.heads, block.rows, grad)

    for block in call.plan.local:
        attend_own(block)
    reductions = []
    for segment, pending in zip(call.plan.shared, gathers, strict=True):
        assert call.mesh is not None
        keys_values = pending.wait()
        grads = torch.zeros_like(keys_values, dtype=torch.promote_types(k.dtype, call.mesh.reduce_dtype))
        for remote in segment.remote:
            parts = attend(remote.heads, remote.rows, remote.key_rows, gathered_keys(keys_values, remote), False)
            place_gathered(grads, remote, parts)
        reductions.append(call.start_reduction(segment, grads))
    for segment in call.plan.shared:
        for block in segment.own:
            attend_own(block)
    for segment, pending in zip(call.plan.shared, reductions, strict=True):
        summed = pending.wait()
        for packing in segment.packing:
            for total, part in zip((dk, dv), summed, strict=True):
                total.add(packing.heads, packing.rows, rectangle(part, packing.heads, packing.packed))
    dq_BLHD, dk_BLGD, dv_BLGD = (total.result().to(q.dtype).contiguous() for total in (dq, dk, dv))
    return dq_BLHD.view(q.shape), dk_BLGD, dv_BLGD, dbias


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*rest)
    mesh, kept = mesh_of(options.mesh), 0
    if mesh is not None and mesh.keep_kv:
        shared = options.plan(mesh.shard, k.shape[2]).shared
        kept = 2 * sum(segment.num_ranks * segment.sent_rows for segment in shared) * math.prod(k.shape[2:]) * len(k)
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse, q.new_empty(kept)


@_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gathered: Tensor,
    rel_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dbias = q.new_empty(0 if rel_bias is None else rel_bias.shape, dtype=accumulation_dtype(q.dtype))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, rel_bias, *ctx.rest = inputs
    out, lse, gathered = output
    ctx.set_materialize_grads(False)
    ctx.mesh = mesh_of(ctx.rest[-1])  # Held, so that its handle is still good in the backward.
    keeps = ctx.mesh is not None and ctx.mesh.keep_kv
    ctx.save_for_backward(q, k, v, out, lse, rel_bias, *([gathered] if keeps else []))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, rel_bias, *kept = ctx.saved_tensors
    nothing = q.new_empty(0)
    total: list[Tensor] = []
    if dout is not None:
        given = (dout, q, k, v, out, lse, kept[0] if kept else nothing, rel_bias, *ctx.rest)
        total += _differentiable(_AttentionBackward, _backward_op, *given)
    if dlse is not None:
        # d lse / d score is the weight p. Flash computes p (dout . v - dout . out): with v = 0, a unit vector
        # for dout and -dlse times it for out, that is p dlse. Kept values do not serve: here v is not theirs.
        unit = torch.zeros_like(q)
        unit[..., 0] = 1
        minus = -dlse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1).to(q.dtype) * unit
        given = (unit, q, k, torch.zeros_like(v), minus, lse, nothing, rel_bias, *ctx.rest)
        dq, dk, dv, dbias = _differentiable(_AttentionBackward, _backward_op, *given)
        of_lse = [dq, dk, torch.zeros_like(dv), dbias]
        total = [a + b for a, b in zip(total, of_lse, strict=True)] if total else of_lse
    if not total:
        return (None,) * (4 + len(ctx.rest))
    dq, dk, dv, dbias = total
    return dq, dk, dv, None if rel_bias is None else dbias.to(rel_bias.dtype), *([None] * len(ctx.rest))


def _differentiable(function: type[torch.autograd.Function], operator: Any, *args: Any) -> Any:
    """Call an operator so that torch.func's transforms work, and a derivative that it lacks is an error, never 0.

    Torch's own registration does neither, but is what torch.compile takes.
    """
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if internals.is_in_forward_mode():
        raise ValueError(_NO_FORWARD_MODE)
    return operator(*args)


class _ReverseOnly(torch.autograd.Function):
    """An operator's derivatives: in reverse mode alone."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise ValueError(_NO_FORWARD_MODE)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _each(cls.apply, info, in_dims, *args)


class _Attention(_ReverseOnly):
    """The forward operator, differentiable once."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _forward_op(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _AttentionBackward(_ReverseOnly):
    """The backward operator, which has no derivative."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise ValueError(_NO_SECOND_DERIVATIVE)


def _each(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule for torch.vmap: one call for each entry, as a bias, kept keys or a mesh may be the same for all."""
    calls = [
        operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


for _operator in (_forward_op, _backward_op):
    _operator.register_vmap(partial(_each, _operator))
_forward_op.register_autograd(_backward, setup_context=_setup_context)
