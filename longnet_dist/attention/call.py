"""The plan, kernel, bias and exchanges of one call of an operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from longnet_dist.attention.arguments import Options, kernel_request
from longnet_dist.attention.bias import BiasOfRectangle, PositionBias
from longnet_dist.attention.exchanges import Exchange
from longnet_dist.attention.exchanges.all_gather import AllGather
from longnet_dist.attention.exchanges.all_to_all import AllToAll
from longnet_dist.attention.exchanges.exchange import SendNeeded
from longnet_dist.attention.kernels import Kernel, choose_kernel
from longnet_dist.attention.kernels.contract import PackedKernel
from longnet_dist.distributed.batch import Batch
from longnet_dist.distributed.mesh import SequenceMesh, mesh_of
from longnet_dist.plan.blocks import Plan, Rows, SharedBranch
from longnet_dist.plan.cost import LayerSize, keeps_arrivals
from longnet_dist.plan.shard import Shard

STRATEGIES: dict[str, Callable[[SharedBranch, SequenceMesh, Batch], Exchange]] = {
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "exchange": SendNeeded,
}
"""The strategies of exchange by name."""

HeadTable = tuple[tuple[int, ...], ...]
"""The key/value heads of a rectangle: F rows of M numbers."""


@dataclass(frozen=True)
class Call:
    """The plan, kernel, mesh and bias of one call, and its settings: all but the tensors."""

    plan: Plan
    kernel: Kernel
    mesh: SequenceMesh | None
    causal: bool
    scale: float
    bias: PositionBias | None
    num_kv_heads: int
    shares_collectives: bool
    packed_kernel: PackedKernel | None = None
    """The kernel, if it attends the squares of many documents in one call; None without documents."""

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, bias_parameters: Tensor | None, cu_seqlens: Tensor | None, options: Options
    ) -> Call:
        """Look up the plan and the kernel of a call."""
        bias = None if bias_parameters is None else PositionBias.from_spec(options.bias, bias_parameters)
        kernel = choose_kernel(options.kernel, kernel_request(q, bias))
        if options.kernel == "auto" and q.is_cuda and q.dtype == torch.float32:
            _warn_of_float32()
        mesh = mesh_of(options.mesh)
        plan = plan_of(q, k, options, () if cu_seqlens is None else tuple(cu_seqlens.tolist()))
        shares = mesh is not None and len(plan.shared) > 0 and mesh.shares_collectives(_layer_size(q, k, options))
        packed = None
        if cu_seqlens is not None and bias is None:
            request = replace(kernel_request(q, bias), variable_lengths=True)
            packed = None if kernel.unsupported(request) else cast(PackedKernel, kernel)
        return cls(plan, kernel, mesh, options.causal, options.scale, bias, k.shape[2], shares, packed)

    @property
    def in_place(self) -> bool:
        """Whether the kernel attends rectangles in place; see `contract.Kernel`."""
        return getattr(self.kernel, "IN_PLACE", False)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """View (B, L, H, ...) as (B, L, G, H / G, ...)."""
        return x.unflatten(2, (self.num_kv_heads, x.shape[2] // self.num_kv_heads))

    def bias_of(
        self, heads: HeadTable, query_rows: Sequence[Rows], key_rows: Sequence[Rows], rectangles: int
    ) -> BiasOfRectangle | None:
        """Return the position bias of b rectangles for the kernel; None if the call has none."""
        if self.bias is None:
            return None
        by_kv_head = self.bias.parameters.t().unflatten(0, (self.num_kv_heads, -1))
        parameters = by_kv_head[torch.tensor(heads, device=by_kv_head.device)].flatten(1, 2)
        parameters = parameters.repeat(rectangles // len(heads), 1, 1)
        queries, keys = (_positions(runs, parameters.device) for runs in (query_rows, key_rows))
        shift = None if self.bias.by_distance else _shifts(query_rows[0], len(heads), rectangles, parameters.device)
        (query_run,), key_runs = ([(rows.position, rows.count) for rows in runs] for runs in (query_rows, key_rows))
        return BiasOfRectangle(
            self.bias,
            parameters,
            queries,
            keys,
            shift,
            self.causal,
            len(heads),
            query_rows[0].rate,
            query_run,
            tuple(key_runs),
        )

    def add_bias_gradient(self, dbias: Tensor, heads: HeadTable, grad: Tensor) -> None:
        """Add the gradient of b rectangles' bias parameters, (b, M H / G, P), to dbias, (P, H)."""
        by_kv_head = dbias.t().unflatten(0, (self.num_kv_heads, -1))
        table = torch.tensor(heads, device=dbias.device)
        summed = grad.unflatten(0, (-1, len(heads))).sum(0).unflatten(1, (table.shape[1], -1))
        by_kv_head.index_put_((table,), summed.to(dbias.dtype), accumulate=True)

    def exchanges(self) -> tuple[list[Exchange], Batch]:
        """Return the exchanges of the call, which are not started, and their collectives."""
        batch = Batch(self.shares_collectives)
        if self.mesh is None:
            return [], batch
        return [STRATEGIES[shared.strategy](shared, self.mesh, batch) for shared in self.plan.shared], batch


@cache
def _warn_of_float32() -> None:
    """Warn once in each process."""
    warnings.warn(
        "attention in float32 on a GPU is slow, because flash attention takes only bfloat16 and float16: compute under "
        'torch.autocast("cuda", torch.bfloat16), or cast q, k and v. (kernel="triton" means float32, and is silent)',
        stacklevel=2,
    )


def plan_of(q: Tensor, k: Tensor, options: Options, documents: tuple[int, ...] = ()) -> Plan:
    """Return the plan of a call; it is empty if all ranks' tensors are. For `documents`, see `make_plan`."""
    batch, num_rows, num_heads, dim = q.shape
    if 0 in (batch, num_heads, dim):
        return Plan((), (), ())
    mesh, layer = mesh_of(options.mesh), _layer_size(q, k, options)
    if mesh is None:
        return options.plan(Shard(num_rows, max(1, num_rows)), layer.num_kv_heads, (), documents)
    return options.plan(mesh.shard, layer.num_kv_heads, mesh.strategies(layer), documents)


def retained_sizes(plan: Plan, q: Tensor, k: Tensor, options: Options, cu_seqlens: Tensor | None) -> list[int | None]:
    """Return the number of elements that each exchange retains for the backward; None if it sends them again.

    With documents all is sent again: a compiled graph, which does not know them, could not know the sizes.
    """
    if cu_seqlens is not None:
        return [None] * len(plan.shared)
    mesh, layer = mesh_of(options.mesh), _layer_size(q, k, options)
    sizes: list[int | None] = []
    for shared in plan.shared:
        assert mesh is not None
        queries, keys = shared.arriving_rows
        keeps = keeps_arrivals(shared.branch, shared.strategy, mesh.shard, layer, mesh.keep_kv)
        vectors = queries * layer.num_heads // layer.num_kv_heads + 2 * keys
        sizes.append(len(q) * layer.head_dim * vectors if keeps else None)
    return sizes


def _layer_size(q: Tensor, k: Tensor, options: Options) -> LayerSize:
    # torch.compile may hold these as symbols, which int() replaces by their values.
    return LayerSize(int(q.shape[2]), int(k.shape[2]), int(q.shape[3]), q.dtype.itemsize, options.causal)


def unit_stride(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension, which kernels need; copied only if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _shifts(rows: Rows, num_phases: int, rectangles: int, device: torch.device) -> Tensor:
    """Return how many rows each rectangle lies behind the first, (b,); in the order of sequence, segment and phase."""
    segments, phases = torch.arange(rows.segments, device=device), torch.arange(num_phases, device=device)
    shifts = (segments[:, None] * rows.segment_step + phases * rows.phase_step).flatten()
    return shifts.repeat(rectangles // len(shifts))


def _positions(runs: Sequence[Rows], device: torch.device) -> Tensor:
    return torch.cat([rows.position + rows.rate * torch.arange(rows.count, device=device) for rows in runs])
