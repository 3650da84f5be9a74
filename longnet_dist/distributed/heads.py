"""Heads that tensor parallelism shards over ranks, as DTensors; each rank attends its own heads.

`Shard` here is torch's placement of a DTensor; the rows of a rank are `plan.shard.Shard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

_HEADS = 2
"""The dimension of heads in (B, L, H, D) and in (B, L, H)."""


@dataclass(frozen=True)
class HeadShard:
    """The key/value heads of this rank: they begin with number `first` of `total`, and are placed as DTensors."""

    first: int
    total: int
    device_mesh: DeviceMesh
    placements: tuple[Any, ...]

    def whole(self, x: Tensor) -> Tensor:
        """Wrap this rank's heads of (B, L, H, ...) as the DTensor of all heads."""
        return DTensor.from_local(x, self.device_mesh, self.placements, run_check=False)


def head_shard(q: Tensor, k: Tensor, v: Tensor) -> HeadShard | str | None:
    """Return how q, k and v are sharded by head; None for plain tensors, a message if that cannot work."""
    if not any(isinstance(x, DTensor) for x in (q, k, v)):
        return None
    if not (isinstance(q, DTensor) and isinstance(k, DTensor) and isinstance(v, DTensor)):
        types = ", ".join(f"{name} {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{types}: either all must be DTensors, or none"
    if not (q.device_mesh == k.device_mesh == v.device_mesh and q.placements == k.placements == v.placements):
        placements = ", ".join(f"{name} {x.placements}" for name, x in (("q", q), ("k", k), ("v", v)))
        return f"{placements}: q, k and v must be DTensors of one mesh and one placement"
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
    """Wrap this rank's heads, in `dim`, as the DTensor of all heads.

    Every rank of `device_mesh`, which has one axis, must hold equally many heads.
    """
    return DTensor.from_local(x, device_mesh, [Shard(dim)], run_check=False)
