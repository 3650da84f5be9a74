"""Heads that tensor parallelism has spread over ranks: DTensors in, DTensors out, and each rank attends its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

_HEADS = 2
"""Their dimension, in (B, L, H, D) and in (B, L, H)."""


@dataclass(frozen=True)
class HeadShard:
    """Which key/value heads this rank has: those from `first` on, of `total`."""

    first: int
    total: int
    device_mesh: DeviceMesh
    placements: tuple[Any, ...]

    def whole(self, x: Tensor) -> Tensor:
        """This rank's heads of (B, L, H, ...) as what they are a part of."""
        return DTensor.from_local(x, self.device_mesh, self.placements, run_check=False)


def head_shard(q: Tensor, k: Tensor, v: Tensor) -> HeadShard | str | None:
    """How q, k and v are sharded by head; None where they are plain tensors, or in words why that cannot be."""
    if not any(isinstance(x, DTensor) for x in (q, k, v)):
        return None
    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        kinds = ", ".join(f"{name} {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{kinds}: all must be DTensors, or none"
    if not (q.device_mesh == k.device_mesh == v.device_mesh and q.placements == k.placements == v.placements):
        said = ", ".join(f"{name} {x.placements}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{said}: q, k and v must be DTensors of one mesh and one placement"
    first, parts = 0, 1
    for axis, placement in enumerate(q.placements):
        if placement.is_replicate() or placement == Shard(0):
            continue
        if placement != Shard(_HEADS) or parts > 1:
            return (
                f"q, k and v are placed as {q.placements}; heads (dimension {_HEADS}) may be sharded, over one axis, "
                "and the batch. A sequence is sharded by mesh=SequenceMesh(...), to which each rank passes its "
                "rows, as plain tensors or as DTensors over other axes"
            )
        parts = q.device_mesh.size(axis)
        if k.shape[_HEADS] % parts or q.shape[_HEADS] % parts:
            return (
                f"{q.shape[_HEADS]} query and {k.shape[_HEADS]} key/value heads cannot be sharded evenly over {parts}"
            )
        first = k.shape[_HEADS] // parts * q.device_mesh.get_local_rank(axis)
    return HeadShard(first, k.shape[_HEADS], q.device_mesh, q.placements)


def heads_of(x: Tensor, device_mesh: DeviceMesh, dim: int = _HEADS) -> DTensor:
    """This rank's heads, in `dim`, as their part of all; every rank of `device_mesh` (one axis) has as many."""
    return DTensor.from_local(x, device_mesh, [Shard(dim)], run_check=False)
