"""What one call computes with: its plan and kernel, the gathers it starts, and rectangles as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from longnet_dist.attention.arguments import Options
from longnet_dist.attention.kernels import choose_kernel
from longnet_dist.attention.kernels.bias import RectangleBias
from longnet_dist.attention.rows import rectangle
from longnet_dist.distributed.collectives import Pending
from longnet_dist.distributed.mesh import SequenceMesh, mesh_of
from longnet_dist.plan.blocks import Heads, Plan, RemoteBlock, Rows, SharedSegment
from longnet_dist.plan.shard import Shard


@dataclass(frozen=True)
class Call:
    """What one call computes with, apart from q, k and v."""

    plan: Plan
    kernel: ModuleType
    mesh: SequenceMesh | None
    causal: bool
    scale: float
    rel_bias: Tensor | None
    rel_bias_max_distance: int
    num_kv_heads: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, rel_bias: Tensor | None, options: Options) -> Call:
        """The plan and kernel of a call; no rectangles where there is nothing to attend."""
        mesh = mesh_of(options.mesh)
        shard = Shard(q.shape[1], max(1, q.shape[1])) if mesh is None else mesh.shard
        plan = options.plan(shard, k.shape[2]) if q.numel() else Plan((), ())
        kernel = choose_kernel(options.kernel, q.device, q.dtype, q.shape[-1], rel_bias is not None)
        bias = (rel_bias, options.rel_bias_max_distance)
        return cls(plan, kernel, mesh, options.causal, options.scale, *bias, k.shape[2])

    def by_kv_head(self, x: Tensor) -> Tensor:
        """(B, L, H, ...) as (B, L, G, H / G, ...), a view."""
        return x.unflatten(2, (self.num_kv_heads, x.shape[2] // self.num_kv_heads))

    def bias_of(self, rel_bias: Tensor, heads: Heads) -> Tensor:
        """The relative biases (buckets, H) of some heads, a view: (1, 1, F, 1, M, H / G, buckets)."""
        one_row = Rows(0, 0, 1, 1, 0, 1)
        return rectangle(rel_bias.t().unflatten(0, (self.num_kv_heads, -1))[None, None], heads, one_row)

    def bias(self, heads: Heads, rows: Rows, keys: Sequence[Rows], batch: int) -> RectangleBias | None:
        """The relative bias of a rectangle, as the kernel takes it."""
        if self.rel_bias is None:
            return None
        table = self.bias_of(self.rel_bias, heads)
        table = table.expand(batch, rows.segments, *table.shape[2:])
        queries, of_keys = (_positions(runs, table.device) for runs in ([rows], keys))
        return RectangleBias(of_queries(table)[:, 0], queries, of_keys, self.rel_bias_max_distance, self.causal)

    def start_gathers(self, k: Tensor, v: Tensor, gathered: Tensor | None = None) -> list[Pending]:
        """Of every shared segment, its ranks' kept K and V: (P, 2, B, sent rows, G, D), or what the forward kept."""
        pending = []
        for segment in self.plan.shared:
            assert self.mesh is not None
            communicator = self.mesh.communicator(segment)
            packed = k.new_zeros(2, len(k), segment.sent_rows, *k.shape[2:])
            if gathered is not None and gathered.numel():
                kept, gathered = gathered.split([n := segment.num_ranks * packed.numel(), gathered.numel() - n])
                pending.append(Pending(communicator, "", kept.view(segment.num_ranks, *packed.shape)))
                continue
            for packing in segment.packing:
                for x, sent in zip((k, v), packed, strict=True):
                    rows = rectangle(x, packing.heads, packing.rows)
                    rectangle(sent, packing.heads, packing.packed).copy_(rows)
            pending.append(communicator.all_gather(packed, _what("gathering the keys and values", segment)))
        return pending

    def start_reduction(self, segment: SharedSegment, grads: Tensor) -> Pending:
        """Hand the ranks of a segment their dK and dV, (P, 2, B, sent rows, G, D) -> (2, B, sent rows, G, D)."""
        assert self.mesh is not None
        what = _what("reducing the gradients of keys and values", segment)
        return self.mesh.communicator(segment).reduce_scatter(grads, what)


def _what(doing: str, segment: SharedSegment) -> str:
    return f"{doing} of branch {segment.branch} over ranks {segment.first_rank} to {segment.last_rank}"


def gathered_keys(gathered: Tensor, block: RemoteBlock) -> list[Tensor]:
    """K and V of a block's keys, those of all peers in one rectangle: (B, 1, F, J, M, D) each."""
    return [
        torch.cat([rectangle(gathered[peer, which], block.heads, rows) for peer, rows in block.keys], dim=3)
        for which in (0, 1)
    ]


def place_gathered(grads: Tensor, block: RemoteBlock, parts: Sequence[Tensor]) -> None:
    """The inverse of `gathered_keys`: the gradients of a block's keys, to where their ranks' are."""
    for which, part in enumerate(parts):
        pieces = part.split([rows.count for rows in block.key_rows], dim=3)
        for (peer, rows), piece in zip(block.keys, pieces, strict=True):
            rectangle(grads[peer, which], block.heads, rows).copy_(piece)


def of_keys(x_BSFIMD: Tensor) -> Tensor:
    """K or V of a rectangle as kernels take it, (b = B S F, J, M, D): a view where strides allow, else a copy."""
    return x_BSFIMD.flatten(0, 2)


def of_queries(x_BSFIMR: Tensor) -> Tensor:
    """What queries have, (B, S, F, I, M, R, ...), as kernels take it: (b = B S F, I, M R, ...)."""
    return x_BSFIMR.flatten(0, 2).flatten(2, 3)


def _positions(runs: Sequence[Rows], device: torch.device) -> Tensor:
    return torch.cat([rows.position + rows.rate * torch.arange(rows.count, device=device) for rows in runs])


def unit_stride(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, which kernels need."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
