"""How ranks are arranged: dp_replicate x dp_shard x sp, one DeviceMesh with named axes, and FSDP2 over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp_replicate", "dp_shard", "sp")


@dataclass(frozen=True)
class ParallelConfig:
    """Ranks along each axis; their product is the number of ranks."""

    dp_replicate: int = 1
    """Replicas of the parameters, each with other sequences."""
    dp_shard: int = 1
    """Ranks with other sequences that share one copy of the parameters (FSDP2)."""
    sp: int = 0
    """Ranks that hold one sequence together, and share the parameters too; 0 for all that are left."""

    def degrees(self, num_ranks: int) -> tuple[int, int, int]:
        """(dp_replicate, dp_shard, sp) for this many ranks.

        Raises:
            ValueError: where they do not multiply to the number of ranks.
        """
        given = (self.dp_replicate, self.dp_shard, self.sp)
        if self.dp_replicate < 1 or self.dp_shard < 1 or self.sp < 0:
            raise ValueError(f"parallel axes {dict(zip(AXES, given, strict=True))}: each must be at least 1 (sp: or 0)")
        data = self.dp_replicate * self.dp_shard
        sp = self.sp or num_ranks // data
        if data * sp != num_ranks:
            raise ValueError(
                f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x sp {self.sp or '(the rest)'} does not "
                f"make the {num_ranks} ranks that there are: start a multiple of {data * max(1, self.sp)} ranks, or "
                "leave sp at 0 for the rest"
            )
        return self.dp_replicate, self.dp_shard, sp


def make_device_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """The mesh of all ranks, with `AXES`; None for a process without others. Collective.

    Raises:
        ValueError: where the axes do not multiply to the number of ranks.
    """
    # Imported here because the options of `longnet-dist train --help` need no torch.
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    degrees = config.degrees(dist.get_world_size() if dist.is_initialized() else 1)
    return init_device_mesh(device_type, degrees, mesh_dim_names=AXES) if dist.is_initialized() else None


def shard_parameters(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh | None) -> None:
    """FSDP2, in place: parameters, gradients and optimizer state sharded over dp_shard x sp, replicated over the rest.

    Gradients come out as the *mean* over all ranks, as FSDP has it. Collective.
    """
    if mesh is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    replicate, shard, sp = mesh.shape
    grid = init_device_mesh(mesh.device_type, (replicate, shard * sp), mesh_dim_names=("dp_replicate", "fsdp"))
    over = grid if replicate > 1 else grid["fsdp"]
    for block in blocks:
        fully_shard(block, mesh=over)
    fully_shard(model, mesh=over)
