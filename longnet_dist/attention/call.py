"""The plan, kernel, bias and exchanges of one call of an operator, and rectangles in the shapes of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_dist.attention.arguments import Options
from longnet_dist.attention.bias import BiasOfRectangle, PositionBias
from longnet_dist.attention.exchanges import Exchange
from longnet_dist.attention.exchanges.gather import Gather, retained_size
from longnet_dist.attention.kernels import Kernel, KernelRequest, choose_kernel
from longnet_dist.attention.rows import rectangle
from longnet_dist.distributed.mesh import SequenceMesh, mesh_of
from longnet_dist.plan.blocks import Heads, Plan, Rows
from longnet_dist.plan.shard import Shard


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

    @classmethod
    def of(cls, q: Tensor, k: Tensor, bias_parameters: Tensor | None, options: Options) -> Call:
        """Look up the plan and the kernel of a call; the plan is empty if q is."""
        mesh = mesh_of(options.mesh)
        shard = Shard(q.shape[1], max(1, q.shape[1])) if mesh is None else mesh.shard
        plan = options.plan(shard, k.shape[2]) if q.numel() else Plan((), ())
        bias = None if bias_parameters is None else PositionBias.from_spec(options.bias, bias_parameters)
        request = KernelRequest(q.device, q.dtype, q.shape[-1], bias=bias is not None)
        kernel = choose_kernel(options.kernel, request)
        return cls(plan, kernel, mesh, options.causal, options.scale, bias, k.shape[2])

    def by_kv_head(self, x: Tensor) -> Tensor:
        """View (B, L, H, ...) as (B, L, G, H / G, ...)."""
        return x.unflatten(2, (self.num_kv_heads, x.shape[2] // self.num_kv_heads))

    def bias_parameters_of(self, parameters: Tensor, heads: Heads) -> Tensor:
        """View the bias parameters (P, H) of some heads as (1, 1, F, 1, M, H / G, P)."""
        one_row = Rows(0, 0, 1, 1, 0, 1)
        return rectangle(parameters.t().unflatten(0, (self.num_kv_heads, -1))[None, None], heads, one_row)

    def bias_of(self, heads: Heads, rows: Rows, key_rows: Sequence[Rows], batch: int) -> BiasOfRectangle | None:
        """Return the position bias of a rectangle for the kernel; None if the call has none."""
        if self.bias is None:
            return None
        parameters = self.bias_parameters_of(self.bias.parameters, heads)
        parameters = parameters.expand(batch, rows.segments, *parameters.shape[2:])
        queries, keys = (_positions(runs, parameters.device) for runs in ([rows], key_rows))
        return BiasOfRectangle(self.bias, as_queries(parameters)[:, 0], queries, keys, self.causal)

    def start_exchanges(self, k: Tensor, v: Tensor, retained: Tensor | None = None) -> list[Exchange]:
        """Start the exchange of every shared segment, or restore it from what the forward retained.

        The strategy of exchange is chosen here.
        """
        exchanges: list[Exchange] = []
        for segment in self.plan.shared:
            assert self.mesh is not None
            exchange: Exchange = Gather(segment, self.mesh)
            if retained is not None and retained.numel():
                size = retained_size(segment, len(k), k.shape[2:])
                piece, retained = retained.split([size, retained.numel() - size])
                exchange.restore(k, piece)
            else:
                exchange.start(k, v)
            exchanges.append(exchange)
        return exchanges


def retained_elements(plan: Plan, k: Tensor) -> int:
    """Return the number of elements that all exchanges of a call retain for the backward."""
    return sum(retained_size(segment, len(k), k.shape[2:]) for segment in plan.shared)


def as_keys(x_BSFJMD: Tensor) -> Tensor:
    """Reshape K or V of a rectangle for a kernel, (B, S, F, J, M, D) -> (b = B S F, J, M, D).

    The result is a view if strides allow it, else a copy.
    """
    return x_BSFJMD.flatten(0, 2)


def as_queries(x_BSFIMR: Tensor) -> Tensor:
    """Reshape a tensor with query heads for a kernel, (B, S, F, I, M, R, ...) -> (b = B S F, I, M R, ...)."""
    return x_BSFIMR.flatten(0, 2).flatten(2, 3)


def unit_stride(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension, which kernels need; copied only if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _positions(runs: Sequence[Rows], device: torch.device) -> Tensor:
    return torch.cat([rows.position + rows.rate * torch.arange(rows.count, device=device) for rows in runs])
