"""A failure here means: a rank waits for an exchange before it computes what needs no other rank."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longnet_dist import Pattern, SequenceMesh, dilated_attention
from longnet_dist.attention.kernels import KERNELS, eager
from longnet_dist.plan.exchange import STRATEGIES

LOCAL = 16
"""The segment length of the branch that needs no other rank: the other branch has longer rectangles, or no mask."""


class MeetingKernel:
    """The eager kernel. Rank 0 stays in its first call until rank 1 has received rows that rank 0 sent before it.

    In a direction that is not watched, it is the eager kernel alone.
    """

    unsupported = staticmethod(eager.unsupported)

    def __init__(self, rank, store, direction):
        self.rank, self.store, self.direction = rank, store, direction
        self.calls = 0

    def forward(self, q, k, v, **options):
        return self._attend(eager.forward, "forward", k, options, q, k, v)

    def backward(self, dout, q, k, *others, **options):
        return self._attend(eager.backward, "backward", k, options, dout, q, k, *others)

    def _attend(self, attend, direction, k, options, *tensors):
        if direction != self.direction:
            return attend(*tensors, **options)
        self.calls += 1
        if self.rank == 1 and (k.shape[1] > LOCAL or not options["causal"]):
            self.store.set("arrived", "")
        with torch.profiler.record_function("attending"):
            if self.rank == 0 and self.calls == 1:
                self.store.set("attending", "")
                self.store.wait(["arrived"], timedelta(seconds=30))
            return attend(*tensors, **options)


def attend_while_rows_travel(group, strategy, direction, path):
    """Return rank 0's intervals of exchanges, and of its first call of the kernel, in microseconds."""
    mesh = SequenceMesh(group, Pattern((LOCAL, 64), (1, 2)), 64, strategy=strategy, keep_kv=False)
    mesh.agree = lambda *arguments: None  # Otherwise the ranks meet before they exchange rows.
    store = dist.FileStore(str(path), 2)
    KERNELS["meeting"] = MeetingKernel(mesh.rank, store, direction)
    q = torch.randn(1, mesh.shard.num_rows, 4, 8, requires_grad=True)

    def call():
        return dilated_attention(q, q, q, mesh.pattern, causal=True, mesh=mesh, kernel="meeting")

    def step():
        if mesh.rank == 1:
            store.wait(["attending"], timedelta(seconds=30))
        out.sum().backward() if direction == "backward" else call()

    out = call() if direction == "backward" else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step()
    events = [(event.name, event.time_range.start, event.time_range.end) for event in profile.events()]
    return [event[1:] for event in events if "gloo:" in event[0]], min(e[1:] for e in events if e[0] == "attending")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exchange_runs_while_another_branch_computes(pool, strategy, direction, tmp_path):
    """Rank 1 begins when rank 0 computes, and receives rank 0's rows before rank 0 ends; so rank 0's trace shows it."""
    exchanges, attending = pool.run(2, attend_while_rows_travel, strategy, direction, tmp_path / "store", limit=60)[0]
    assert any(start < attending[1] and end > attending[0] for start, end in exchanges)
