"""The strategy `exchange`: each rank is sent just the keys and values that its queries see.

    forward     all_to_all (sent, 2, B, D) -> (received, 2, B, D)     K and V; if causal, only to later ranks
    backward    all_to_all (received, 2, B, D) -> (sent, 2, B, D)     dK and dV, which their owner sums

One collective over the mesh serves a branch, whose ranks may have no, one or two shared segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.attention.exchanges.remote_keys import RemoteKeys
from longnet_dist.attention.exchanges.tables import sizes_by_rank
from longnet_dist.attention.rows import accumulation_dtype
from longnet_dist.distributed.batch import Part
from longnet_dist.plan.blocks import SharedPart


class SendNeeded(RemoteKeys):
    """The exchange of a branch's keys and values between those ranks that need them; satisfies `exchanges.Exchange`."""

    def _start_keys(self, packed: list[Tensor], like: Tensor) -> None:
        copies = [
            own.expand(len(part.segment.key_targets), *own.shape).flatten(0, 1)
            for part, own in zip(self.shared.parts, packed, strict=True)
        ]
        rows = torch.cat(copies) if copies else like.new_empty(0, 2, len(like), like.shape[-1])
        self._arriving = self._all_to_all(rows, "sending keys and values", back=False)

    def _wait_keys(self) -> Tensor:
        return self._arriving.wait()

    def _new_gradients(self, keys: Tensor) -> Tensor:
        return torch.zeros_like(keys)

    def _start_gradients(self, grads: Tensor) -> None:
        self._returning = self._all_to_all(grads, "returning the gradients of keys and values", back=True)

    def _wait_gradients(self) -> list[Tensor]:
        grads = self._returning.wait()
        by_part = grads.split([sum(part.segment.sent_keys) for part in self.shared.parts])
        dtype = accumulation_dtype(grads.dtype)
        # Every target sends the gradients of all rows of this rank, in their order.
        return [
            x.view(len(part.segment.key_targets), part.segment.num_own, *x.shape[1:]).sum(0, dtype=dtype)
            for part, x in zip(self.shared.parts, by_part, strict=True)
        ]

    def _layout(self, part: SharedPart) -> tuple[int, tuple[int, ...], int | None]:
        # The ranks of the first part are before this one, and those of the second after it.
        first = 0 if part is self.shared.parts[0] else sum(self.shared.parts[0].segment.received_keys)
        return first, tuple(part.segment.key_sources), None

    def _all_to_all(self, rows: Tensor, doing: str, back: bool) -> Part:
        communicator = self.mesh.everyone
        assert communicator is not None
        segments = [part.segment for part in self.shared.parts]
        sent = sizes_by_rank(0, communicator.size, *((s.key_targets, s.sent_keys) for s in segments))
        received = sizes_by_rank(0, communicator.size, *((s.key_sources, s.received_keys) for s in segments))
        what = f"{doing} of branch {self.shared.branch} over ranks 0 to {communicator.size - 1}"
        sizes = (received, sent) if back else (sent, received)
        return self.batch.all_to_all(communicator, rows, *sizes, what)
