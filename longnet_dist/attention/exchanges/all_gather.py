"""The strategy `all_gather`: every rank of a segment receives the kept keys and values of all of them.

    forward     all_gather     (n, 2, B, D) -> (P, n, 2, B, D)     K and V in one collective
    backward    reduce_scatter (P, n, 2, B, D) -> (n, 2, B, D)     dK and dV, summed

P ranks hold the segment. Each sends n rows, the most that one of them keeps, all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.attention.exchanges.remote_keys import RemoteKeys
from longnet_dist.distributed.batch import Batch
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.plan.blocks import SharedBranch, SharedPart


class AllGather(RemoteKeys):
    """The gather of one segment's keys and values, and its dual; satisfies `exchanges.Exchange`."""

    def __init__(self, shared: SharedBranch, mesh: SequenceMesh, batch: Batch) -> None:
        super().__init__(shared, mesh, batch)
        (part,) = shared.parts
        self._segment = part.segment
        self._communicator = mesh.communicator(part.segment)

    def _start_keys(self, packed: list[Tensor], like: Tensor) -> None:
        (own,) = packed
        missing = self._segment.gathered_rows - len(own)
        padded = torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own
        what = f"gathering the keys and values of {self._segment}"
        self._arriving = self.batch.all_gather(self._communicator, padded, what)

    def _wait_keys(self) -> Tensor:
        return self._arriving.wait().flatten(0, 1)

    def _new_gradients(self, keys: Tensor) -> Tensor:
        # The collective sums, so its dtype decides how errors grow with the number of ranks.
        return torch.zeros_like(keys, dtype=torch.promote_types(keys.dtype, self.mesh.reduce_dtype))

    def _start_gradients(self, grads: Tensor) -> None:
        by_rank = grads.unflatten(0, (self._segment.num_ranks, -1))
        what = f"reducing the gradients of keys and values of {self._segment}"
        self._returning = self.batch.reduce_scatter(self._communicator, by_rank, what)

    def _wait_gradients(self) -> list[Tensor]:
        return [self._returning.wait()]

    def _layout(self, part: SharedPart) -> tuple[int, tuple[int, ...], int | None]:
        segment = part.segment
        return 0, tuple(range(segment.first_rank, segment.last_rank + 1)), segment.gathered_rows
