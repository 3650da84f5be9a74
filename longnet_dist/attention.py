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
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from longnet_dist.bias import check_relative_bias
from longnet_dist.comm import Pending
from longnet_dist.kernels import choose_kernel
from longnet_dist.kernels.bias import RectangleBias
from longnet_dist.mesh import SequenceMesh, mesh_of
from longnet_dist.pattern import Pattern
from longnet_dist.plan import Heads, OwnBlock, Plan, RemoteBlock, Rows, Shard, SharedSegment, make_plan
from longnet_dist.rows import MergedRows, SummedRows, accumulation_dtype, rectangle


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
        k, v: (B, N or L, G, D), of q's dtype; H a multiple of G: query heads h G // H share a head.
        pattern: the branches. With a mesh, the mesh's own.
        causal: a query sees only keys at or before it.
        mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
        scale: of the scores; 1 / sqrt(D) by default.
        kernel: "auto", or one of `longnet_dist.kernels.KERNELS`; a named one never falls back.
        rel_bias: (buckets, H), T5's learned relative bias by token distance; see `longnet_dist.bias`.
            Over a mesh its gradient on a rank is of that rank's queries: sum it, as any parameter's.
        rel_bias_max_distance: tokens; where its buckets end.
        return_lse: also return log(sum(exp(scores))) over all branches, natural log, differentiable.

    Returns:
        out, of q's shape and dtype: 0 for rows that no branch covers. With `return_lse` (out, lse),
        lse (B, N or L, H) in float32 (float64 for float64), -inf for such rows.

    Raises:
        ValueError: for shapes, dtypes or a kernel that cannot work; over a mesh on every rank, also
            where ranks disagree, on the first such call.
        RuntimeError: where a rank of the mesh is gone, or does not come within the mesh's timeout.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind()
        >>> dilated_attention(q, k, v, Pattern((16, 64), (1, 4)), causal=True).shape
        torch.Size([1, 100, 4, 8])
    """
    if mesh is None:
        problem = _problem(q, k, v, pattern, None, kernel, causal, rel_bias, rel_bias_max_distance)
        if problem:
            raise ValueError(problem)
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    out, lse, _ = _forward_op(
        q,
        k,
        v,
        rel_bias,
        list(pattern.segment_lengths),
        list(pattern.dilation_rates),
        pattern.head_phases,
        causal,
        scale,
        kernel,
        rel_bias_max_distance,
        0 if mesh is None else mesh.handle,
    )
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """What one call computes with, apart from its tensors."""

    plan: Plan
    kernel: ModuleType
    mesh: SequenceMesh | None
    causal: bool
    scale: float
    rel_bias: Tensor | None
    max_distance: int
    num_kv_heads: int

    def what(self, segment: SharedSegment, doing: str) -> str:
        return f"{doing} of branch {segment.branch} over ranks {segment.first_rank} to {segment.last_rank}"

    def by_kv_head(self, x: Tensor) -> Tensor:
        """(B, L, H, ...) as (B, L, G, H / G, ...), a view."""
        return x.unflatten(2, (self.num_kv_heads, x.shape[2] // self.num_kv_heads if self.num_kv_heads else 0))

    def bias_of(self, rel_bias: Tensor, heads: Heads) -> Tensor:
        """The relative biases (buckets, H) of some heads, a view: (1, 1, F, 1, M, H / G, buckets)."""
        return rectangle(rel_bias.t().unflatten(0, (self.num_kv_heads, -1))[None, None], heads, _ONE_ROW)

    def bias(self, heads: Heads, rows: Rows, keys: list[Rows], batch: int) -> RectangleBias | None:
        if self.rel_bias is None:
            return None
        table = self.bias_of(self.rel_bias, heads)
        table = table.expand(batch, rows.segments, *table.shape[2:])
        return RectangleBias(
            _batch_first(table).squeeze(1).flatten(1, 2),
            _positions([rows], self.rel_bias.device),
            _positions(keys, self.rel_bias.device),
            self.max_distance,
            self.causal,
        )


_ONE_ROW = Rows(0, 0, 1, 1, 0, 1)


@torch.library.custom_op("longnet_dist::dilated_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_phases: str,
    causal: bool,
    scale: float,
    kernel: str,
    max_distance: int,
    mesh: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, gathered): `gathered` holds every branch's keys and values where the mesh keeps them, else nothing."""
    pattern = Pattern(tuple(segment_lengths), tuple(dilation_rates), head_phases)
    the_mesh = mesh_of(mesh)
    if the_mesh is not None:
        _agree(the_mesh, q, k, v, pattern, causal, scale, kernel, rel_bias, max_distance)
    call = _make_call(q, k, pattern, causal, scale, kernel, rel_bias, max_distance, the_mesh)
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    gathers = _start_gathers(call, k, v)

    q_BLGRD = call.by_kv_head(q)
    merged = MergedRows(q_BLGRD)

    def attend(heads: Heads, rows: Rows, keys: list[Rows], keys_values: tuple[Tensor, Tensor], causal: bool) -> None:
        bias = call.bias(heads, rows, keys, len(q))
        q_r = _batch_first(rectangle(q_BLGRD, heads, rows)).flatten(2, 3)
        k_r, v_r = map(_batch_first, keys_values)
        out_r, lse_r = call.kernel.forward(q_r, k_r, v_r, causal=causal, scale=scale, bias=bias)
        merged.merge(heads, rows, out_r, lse_r.transpose(1, 2))

    for block in _own_blocks(call.plan):
        own = (rectangle(k, block.heads, block.rows), rectangle(v, block.heads, block.rows))
        attend(block.heads, block.rows, [block.rows], own, causal)
    kept = []
    for segment, pending in zip(call.plan.shared, gathers, strict=True):
        gathered = pending.wait()
        for block in segment.remote:
            keys = [rows for _, rows in block.keys]
            attend(block.heads, block.rows, keys, _gathered_keys(gathered, block), causal=False)
        if the_mesh is not None and the_mesh.keep_kv:
            kept.append(gathered.flatten())
    out, lse = merged.result()
    return out.to(q.dtype).view(q.shape), lse.view(q.shape[:-1]), torch.cat(kept) if kept else q.new_empty(0)


@torch.library.custom_op("longnet_dist::dilated_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gathered: Tensor,
    rel_bias: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_phases: str,
    causal: bool,
    scale: float,
    kernel: str,
    max_distance: int,
    mesh: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, drel_bias), given the merged out and lse; drel_bias is empty where there is no bias."""
    pattern = Pattern(tuple(segment_lengths), tuple(dilation_rates), head_phases)
    call = _make_call(q, k, pattern, causal, scale, kernel, rel_bias, max_distance, mesh_of(mesh))
    dout, q, k, v, out = (_unit_stride(x) for x in (dout, q, k, v, out))
    gathers = _start_gathers(call, k, v, gathered)

    dq_BLGRD, dk, dv = SummedRows(call.by_kv_head(q)), SummedRows(k), SummedRows(v)
    dbias = torch.zeros_like(rel_bias if rel_bias is not None else q.new_empty(0), dtype=accumulation_dtype(q.dtype))
    inputs = [call.by_kv_head(x) for x in (dout, q, out)]
    lse_BLGR = call.by_kv_head(lse)

    def attend_backward(
        heads: Heads, rows: Rows, keys: list[Rows], keys_values: tuple[Tensor, Tensor], causal: bool
    ) -> tuple[Tensor, Tensor]:
        bias = call.bias(heads, rows, keys, len(q))
        dout_r, q_r, out_r = (_batch_first(rectangle(x, heads, rows)).flatten(2, 3) for x in inputs)
        lse_r = _batch_first(rectangle(lse_BLGR, heads, rows)).flatten(2, 3).transpose(1, 2).contiguous()
        k_r, v_r = map(_batch_first, keys_values)
        dq_r, dk_r, dv_r, dtable = call.kernel.backward(
            dout_r, q_r, k_r, v_r, out_r, lse_r, causal=causal, scale=scale, bias=bias
        )
        dq_BLGRD.add(heads, rows, dq_r)
        if dtable is not None:
            _add_bias_gradient_(call, dbias, heads, dtable)
        return dk_r.reshape(keys_values[0].shape), dv_r.reshape(keys_values[1].shape)

    def own_backward(block: OwnBlock) -> None:
        own = (rectangle(k, block.heads, block.rows), rectangle(v, block.heads, block.rows))
        parts = attend_backward(block.heads, block.rows, [block.rows], own, causal)
        for total, part in zip((dk, dv), parts, strict=True):
            total.add(block.heads, block.rows, part)

    for block in call.plan.local:
        own_backward(block)
    reductions = []
    for segment, pending in zip(call.plan.shared, gathers, strict=True):
        reductions.append(_remote_backward(call, segment, pending.wait(), attend_backward))
    for segment in call.plan.shared:
        for block in segment.own:
            own_backward(block)
    for segment, pending in zip(call.plan.shared, reductions, strict=True):
        summed = pending.wait()
        for packing in segment.packing:
            for total, part in zip((dk, dv), summed, strict=True):
                total.add(packing.heads, packing.rows, rectangle(part, packing.heads, packing.packed))
    dq, dk, dv = (total.result().to(q.dtype) for total in (dq_BLGRD, dk, dv))
    return dq.view(q.shape), dk, dv, dbias


def _start_gathers(call: _Call, k: Tensor, v: Tensor, gathered: Tensor | None = None) -> list[Pending | _Kept]:
    """Of every shared segment, all ranks' kept K and V: (P, 2, B, sent rows, G, D), as they come or as they were kept."""
    pending: list[Pending | _Kept] = []
    first = 0
    for segment in call.plan.shared:
        assert call.mesh is not None
        communicator = call.mesh.communicator(segment)
        packed = k.new_zeros(2, len(k), segment.sent_rows, *k.shape[2:])
        if gathered is not None and gathered.numel():
            shape = (segment.num_ranks, *packed.shape)
            pending.append(_Kept(gathered[first : first + math.prod(shape)].view(shape)))
            first += math.prod(shape)
            continue
        for packing in segment.packing:
            for x, kept in zip((k, v), packed, strict=True):
                rectangle(kept, packing.heads, packing.packed).copy_(rectangle(x, packing.heads, packing.rows))
        pending.append(communicator.all_gather(packed, call.what(segment, "gathering the keys and values")))
    return pending


@dataclass(frozen=True)
class _Kept:
    """A gather that the forward did, and kept for the backward."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result


def _gathered_keys(gathered: Tensor, block: RemoteBlock) -> tuple[Tensor, Tensor]:
    """K and V of a block's keys, those of all peers in one rectangle: (B, 1, F, J, M, D) each."""
    k, v = (
        torch.cat([rectangle(gathered[peer, which], block.heads, rows) for peer, rows in block.keys], dim=3)
        for which in (0, 1)
    )
    return k, v


def _remote_backward(call: _Call, segment: SharedSegment, gathered: Tensor, attend_backward: Any) -> Pending:
    """Backward of this chunk's queries with other ranks' keys; start handing those ranks their dK and dV."""
    assert call.mesh is not None
    dtype = torch.promote_types(gathered.dtype, call.mesh.reduce_dtype)
    gradients = torch.zeros_like(gathered, dtype=dtype)
    for block in segment.remote:
        keys = [rows for _, rows in block.keys]
        parts = attend_backward(block.heads, block.rows, keys, _gathered_keys(gathered, block), False)
        for which, part in enumerate(parts):
            pieces = part.split([rows.count for rows in keys], dim=3)
            for (peer, rows), piece in zip(block.keys, pieces, strict=True):
                rectangle(gradients[peer, which], block.heads, rows).copy_(piece)
    what = call.what(segment, "reducing the gradients of keys and values")
    return call.mesh.communicator(segment).reduce_scatter(gradients, what)


def _add_bias_gradient_(call: _Call, dbias: Tensor, heads: Heads, dtable: Tensor) -> None:
    """Add (B * S * F, M * R, buckets), the gradient of a rectangle's table, to that of the whole (buckets, H)."""
    target = call.bias_of(dbias, heads)
    target += dtable.unflatten(0, (-1, heads.phases)).sum(0).view(target.shape)


def _own_blocks(plan: Plan) -> Iterator[OwnBlock]:
    yield from plan.local
    for segment in plan.shared:
        yield from segment.own


def _batch_first(x_BSFIM: Tensor) -> Tensor:
    """(B, S, F, I, M, ...) as the kernels take it, (b = B S F, I, M, ...): a view where strides allow, else a copy."""
    return x_BSFIM.flatten(0, 2)


def _positions(runs: list[Rows], device: torch.device) -> Tensor:
    return torch.cat([rows.position + rows.rate * torch.arange(rows.count, device=device) for rows in runs])


def _unit_stride(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, which kernels need."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _make_call(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    causal: bool,
    scale: float,
    kernel: str,
    rel_bias: Tensor | None,
    max_distance: int,
    mesh: SequenceMesh | None,
) -> _Call:
    num_kv_heads = k.shape[2]
    shard = Shard(q.shape[1], max(1, q.shape[1])) if mesh is None else mesh.shard
    empty = q.numel() == 0 and (len(q) == 0 or q.shape[1] == 0 or num_kv_heads == 0)
    plan = Plan((), ()) if empty else make_plan(pattern, shard, num_kv_heads, causal)
    module = choose_kernel(kernel, q.device, q.dtype, q.shape[-1], rel_bias is not None)
    return _Call(plan, module, mesh, causal, scale, rel_bias, max_distance, num_kv_heads)


def _agree(
    mesh: SequenceMesh,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    causal: bool,
    scale: float,
    kernel: str,
    rel_bias: Tensor | None,
    max_distance: int,
) -> None:
    """Every rank passes the same, or every rank raises: on the first call that looks like this one."""
    problem = _problem(q, k, v, pattern, mesh, kernel, causal, rel_bias, max_distance)
    given = {
        "pattern": str(pattern),
        "q (batch, heads, head dim)": [q.shape[0], *q.shape[2:]],
        "k (batch, heads, head dim)": [k.shape[0], *k.shape[2:]],
        "dtype": str(q.dtype),
        "device": q.device.type,
        "causal": causal,
        "scale": scale,
        "relative bias": None if rel_bias is None else [*rel_bias.shape, max_distance],
        "requires grad": any(x is not None and x.requires_grad for x in (q, k, v, rel_bias)),
    }
    mesh.agree(given, problem)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    mesh: SequenceMesh | None,
    kernel: str,
    causal: bool,
    rel_bias: Tensor | None,
    max_distance: int,
) -> str | None:
    """What is wrong with the arguments of a call, in words; None where nothing is."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not isinstance(pattern, Pattern):
        return f"pattern is {pattern!r}; it must be a longnet_dist.Pattern"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return f"{shapes}: q must be (B, N, H, D), and k and v (B, N, G, D), the heads after the tokens"
    if k.shape != v.shape:
        return f"{shapes}: k and v must have the same shape"
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        return f"{shapes}: q and k must have the same B, N and D"
    H, G = q.shape[2], k.shape[2]
    if (H == 0) != (G == 0) or (G and H % G):
        return f"{shapes}: {H} query heads cannot share {G} key/value heads; H must be a multiple of G"
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        given = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{given}: q, k and v must have one dtype and one device"
    if mesh is not None and pattern != mesh.pattern:
        return f"the pattern {pattern} is not the mesh's, {mesh.pattern}; pass mesh.pattern, or make a mesh for this one"
    if mesh is not None and q.shape[1] != mesh.shard.num_rows:
        return (
            f"q has {q.shape[1]} rows, and this rank holds {mesh.shard.num_rows}, [{mesh.shard.start}, "
            f"{mesh.shard.stop}) of {mesh.seq_len}; pass mesh.split(x), not the whole sequence"
        )
    if rel_bias is not None:
        if rel_bias.dim() != 2 or rel_bias.shape[1] != H:
            return f"rel_bias is {tuple(rel_bias.shape)}; it must be (buckets, H) with H = {H}"
        if reasons := check_relative_bias(len(rel_bias), max_distance, causal):
            return reasons[0]
    try:
        choose_kernel(kernel, q.device, q.dtype, q.shape[-1], rel_bias is not None)
    except ValueError as error:
        return str(error)
    return None


@_forward_op.register_fake
def _(q, k, v, rel_bias, segment_lengths, dilation_rates, head_phases, causal, scale, kernel, max_distance, mesh):  # type: ignore[no-untyped-def]
    the_mesh, kept = mesh_of(mesh), 0
    if the_mesh is not None and the_mesh.keep_kv:
        pattern = Pattern(tuple(segment_lengths), tuple(dilation_rates), head_phases)
        plan = make_plan(pattern, the_mesh.shard, k.shape[2], causal)
        rows = sum(segment.num_ranks * segment.sent_rows for segment in plan.shared)
        kept = 2 * k.shape[0] * rows * k.shape[2] * k.shape[3]
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse, q.new_empty(kept)


@_backward_op.register_fake
def _(dout, q, k, v, out, lse, gathered, rel_bias, *args):  # type: ignore[no-untyped-def]
    dbias = rel_bias if rel_bias is not None else q.new_empty(0)
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        dbias.new_empty(dbias.shape, dtype=torch.promote_types(q.dtype, torch.float32)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, rel_bias, *ctx.rest = inputs
    out, lse, gathered = output
    ctx.set_materialize_grads(False)
    ctx.mesh = mesh_of(ctx.rest[-1])  # Its handle must still be good in the backward.
    ctx.keeps = ctx.mesh is not None and ctx.mesh.keep_kv
    ctx.save_for_backward(q, k, v, out, lse, rel_bias, *([gathered] if ctx.keeps else []))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, rel_bias, *kept = ctx.saved_tensors
    gathered = kept[0] if kept else q.new_empty(0)
    dq = dk = dv = dbias = None
    if dout is not None:
        dq, dk, dv, dbias = _backward_op(dout, q, k, v, out, lse, gathered, rel_bias, *ctx.rest)
    if dlse is not None:
        # d lse / d score is the weight p. Flash computes p (dout . v - dout . out): with v = 0, a unit vector
        # for dout and -dlse times it for out, that is p dlse. The kept K and V do not serve: there v is not 0.
        unit = torch.zeros_like(q)
        unit[..., 0] = 1
        minus = -dlse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1).to(q.dtype) * unit
        more = _backward_op(unit, q, k, torch.zeros_like(v), minus, lse, q.new_empty(0), rel_bias, *ctx.rest)
        dq = more[0] if dq is None else dq + more[0]
        dk = more[1] if dk is None else dk + more[1]
        dbias = more[3] if dbias is None else dbias + more[3]
    dbias = None if rel_bias is None or dbias is None else dbias.to(rel_bias.dtype)
    return dq, dk, dv, dbias, *([None] * len(ctx.rest))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
