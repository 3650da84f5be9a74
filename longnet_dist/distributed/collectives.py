"""Collectives along dimension 0 of tensors, each next to its dual. Only this file calls torch's collectives.

A collective is started early, and awaited when its result is needed. A failure of either step names
the rank, the branch and the ranks involved.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from longnet_dist import internals
from longnet_dist.distributed.liveness import Process, describe_ended
from longnet_dist.distributed.waits import Stopwatch, mark_wait

# torch 2.13 deprecates the names that 2.11 has.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MESSAGE_BYTES = 4096
"""The bytes that each rank sends to explain a disagreement."""


class Communicator:
    """A group of consecutive ranks of a sequence, with a time limit on each of its collectives.

    `what` describes a collective in errors: it completes "failed while ...", as in "gathering keys".

    Args:
        group: the process group.
        timeout: the time limit of each collective.
        rank_in_sequence: this process's rank among all ranks of the sequence, for messages.
    """

    def __init__(self, group: ProcessGroup, timeout: timedelta, rank_in_sequence: int) -> None:
        self.group = group
        self.timeout = timeout
        self.size = dist.get_world_size(group)
        self.rank_in_sequence = rank_in_sequence
        self.processes: dict[int, Process] = {}
        """The processes of the group by their ranks in the sequence, if they are known."""
        self.waited = Stopwatch()
        """The time in which this rank waited for collectives of the group."""

    def all_gather(self, x: Tensor, what: str) -> Pending:
        """Start to gather x from every rank: (n, ...) -> (P, n, ...). The dual of `reduce_scatter`."""
        x = x.contiguous()
        gathered = x.new_empty(self.size * x.numel())
        return self._start(
            what, gathered.view(self.size, *x.shape), lambda: _all_gather_single(gathered, x.view(-1), self.group, True)
        )

    def reduce_scatter(self, x: Tensor, what: str) -> Pending:
        """Start to sum over ranks, and keep this rank's part: (P, n, ...) -> (n, ...). The dual of `all_gather`."""
        flat = x.contiguous().view(-1)
        part = x.new_empty(flat.numel() // self.size)
        return self._start(
            what,
            part.view(x.shape[1:]),
            lambda: _reduce_scatter_single(part, flat, group=self.group, async_op=True),
        )

    def all_to_all(self, x: Tensor, sent: list[int], received: list[int], what: str) -> Pending:
        """Start to send each rank its rows of x: (sum(sent), ...) -> (sum(received), ...).

        The dual is `all_to_all` with `sent` and `received` exchanged.
        """
        result = x.new_empty(sum(received), *x.shape[1:])
        x = x.contiguous()
        return self._start(
            what, result, lambda: dist.all_to_all_single(result, x, received, sent, group=self.group, async_op=True)
        )

    def all_reduce(self, x: Tensor, what: str) -> Tensor:
        """Sum x over the ranks, in place, on every rank. Its own dual."""
        return self._start(what, x, lambda: dist.all_reduce(x, group=self.group, async_op=True)).wait()

    def agree(self, facts: dict[str, Any], problem: str | None = None) -> None:
        """Check that every rank passes the same `facts`, and that no rank has a `problem`. Collective.

        Ranks compare hashes. Only if these differ, or a rank has a problem, do they exchange the facts.

        Args:
            facts: a small dict of what must be the same on every rank, by its name in errors.
            problem: what is wrong on this rank, or None.

        Raises:
            ValueError: on every rank, naming what differs with the values of the ranks, or the problems.
        """
        text = json.dumps(facts | {"problem": problem} if problem else facts, default=str)
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        extremes = torch.tensor([digest, -digest, int(problem is not None)], device=self.device)
        doing = "comparing the ranks' arguments"
        work = Pending(self, doing, extremes)
        work.start(lambda: dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group, async_op=True))
        highest, minus_lowest, any_problem = work.wait().tolist()
        if highest == -minus_lowest and not any_problem:
            return
        if len(text) > _MESSAGE_BYTES:
            room = _MESSAGE_BYTES // 4 // (1 + len(facts))
            text = json.dumps({name: f"{_ascii(value)[:room]}... {digest}" for name, value in facts.items()})
            text = json.dumps({"problem": _ascii(problem)[: _MESSAGE_BYTES // 4]}) if problem else text
        message = torch.frombuffer(bytearray(text.encode().ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        messages = self.all_gather(message.to(self.device), doing).wait().cpu().numpy()
        _raise_disagreement([json.loads(bytes(row).decode()) for row in messages])

    @property
    def device(self) -> torch.device:
        """The device of the tensors that this group exchanges."""
        on_cpu = "cpu:" in str(dist.get_backend_config(self.group))
        return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    @property
    def device_types(self) -> list[str]:
        """The types of device whose rows the ranks of a mesh can exchange; see `communicators`."""
        if uses_nccl(self.group):
            return ["cuda"]
        return [part.partition(":")[0] for part in str(dist.get_backend_config(self.group)).split(",")]

    def _start(self, what: str, result: Tensor, launch: Callable[[], dist.Work]) -> Pending:
        pending = Pending(self, what, result)
        pending.start(launch)
        return pending


class Pending:
    """A collective that has been started, or is about to start."""

    def __init__(self, communicator: Communicator, what: str, result: Tensor) -> None:
        self.communicator = communicator
        self.what = what
        self.result = result
        self.work: dist.Work | None = None

    def start(self, launch: Callable[[], dist.Work]) -> None:
        """Start the collective."""
        self.work = self._attribute(launch)

    def wait(self) -> Tensor:
        """Wait for the result, and return it; on CUDA, let the current stream wait instead of the host.

        Raises:
            RuntimeError: if a peer is gone, or does not make the call within the time limit.
        """
        if self.work is not None:
            work, self.work = self.work, None
            # NCCL's wait with a time limit would block the host. NCCL's watchdog enforces the group's own limit.
            limit = () if self.result.is_cuda else (self.communicator.timeout,)
            with self.communicator.waited.over(self.result.is_cuda):
                self._attribute(lambda: work.wait(*limit))
        return self.result

    def _attribute(self, step: Callable[[], Any]) -> Any:
        """Run `step`, and add the rank, the branch and the ranks involved to any error."""
        start = time.monotonic()
        try:
            with mark_wait(f"while {self.what}"):
                return step()
        except RuntimeError as error:
            comm = self.communicator
            raise RuntimeError(
                f"rank {comm.rank_in_sequence} of the sequence failed while {self.what}, after "
                f"{time.monotonic() - start:.1f} s (time limit {comm.timeout.total_seconds():g} s). "
                f"{describe_ended(comm.processes) or 'a rank of that group ended, or did not make the same call'}. "
                f"The cause: {error}"
            ) from error


_COMMUNICATORS: WeakKeyDictionary[ProcessGroup, dict[tuple[int, int, timedelta], Communicator | None]]
_COMMUNICATORS = WeakKeyDictionary()
"""The communicators of each group: they live as long as the group, and all its meshes share them.

The inner key is (first rank, last rank, time limit). None stands for a group without this rank.
"""


def communicators(
    group: ProcessGroup,
    rounds: Sequence[Sequence[tuple[int, int]]],
    timeout: timedelta,
    processes: Sequence[Process],
) -> dict[tuple[int, int], Communicator]:
    """Return the communicators of this rank's groups, by (first, last) rank. Collective over `group`.

    In each round every rank creates one process group, of itself alone if it belongs to no group of the
    round. All ranks must create equally many, because torch derives their names from that number. Groups on GPUs have
    only NCCL, and connect here: connections that ranks make in different orders, when they first need them, can hang.

    Args:
        group: all ranks of the sequence.
        rounds: groups of ranks of `group`, disjoint within a round; see `plan.shard.rank_groups`.
        timeout: the time limit of each collective.
        processes: the process of each rank, for messages.
    """
    cache = _COMMUNICATORS.setdefault(group, {})
    ranks = dist.get_process_group_ranks(group)
    me = dist.get_rank(group)
    backend = "nccl" if uses_nccl(group) else None
    for groups in rounds:
        missing = [(a, b) for a, b in groups if (a, b, timeout) not in cache]
        if not missing:
            continue
        first, last = next(((a, b) for a, b in missing if a <= me <= b), (me, me))
        with mark_wait("while creating the process groups of a sequence"):
            subgroup = _new_group(ranks[first : last + 1], timeout=timeout, backend=backend)
            if backend is not None:
                dist.all_reduce(torch.zeros(1, device="cuda"), group=subgroup)
        for a, b in missing:
            cache[a, b, timeout] = Communicator(subgroup, timeout, me) if (a, b) == (first, last) else None
            if (communicator := cache[a, b, timeout]) is not None:
                communicator.processes = dict(enumerate(processes[a : b + 1], a))
    all_groups = {(a, b): cache[a, b, timeout] for groups in rounds for a, b in groups}
    return {ranks: communicator for ranks, communicator in all_groups.items() if communicator is not None}


def uses_nccl(group: ProcessGroup) -> bool:
    """Return whether a group exchanges rows on GPUs by NCCL; it may have gloo beside it."""
    return "cuda:nccl" in str(dist.get_backend_config(group))


def pad_process_groups(count: int) -> None:
    """Create groups of this rank alone until this process has created `count` groups; see `communicators`."""
    while internals.num_process_groups() < count:
        _new_group([dist.get_rank()])


def _new_group(ranks: list[int], **options: Any) -> ProcessGroup:
    """Create a group by the collaboration of its ranks alone."""
    with internals.groups_of_their_own():
        return dist.new_group(ranks, use_local_synchronization=True, **options)


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Gather a small picklable object from every rank, in order of rank. Collective.

    Unpickling may run code: use it only between the ranks of one job, which trust each other.

    Args:
        value: this rank's object.
        group: the ranks; the default group if None.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    with mark_wait("while gathering an object of each rank"):
        dist.all_gather_object(values, value, group=group)
    return values


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks of the job, in float64; every rank gets the same result. Collective."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    with mark_wait("while summing the losses of a step"):
        dist.all_reduce(total)
        return total.tolist()


def _ascii(value: Any) -> str:
    """Replace all but printable ASCII characters, each of which JSON writes as one or two characters."""
    return "".join(c if c.isprintable() else " " for c in str(value).encode("ascii", "replace").decode())


def _raise_disagreement(ranks: Sequence[dict[str, Any]]) -> NoReturn:
    messages = [f"rank {r}: {facts['problem']}" for r, facts in enumerate(ranks) if facts.get("problem")]
    names = dict.fromkeys(name for facts in ranks for name in facts if name != "problem")
    if messages:  # A rank with a problem may not have the other facts.
        names = {name: None for name in names if all(name in facts for facts in ranks)}
    differing = [name for name in names if any(facts.get(name) != ranks[0].get(name) for facts in ranks)]
    if differing:
        messages.append(
            "the ranks of one sequence disagree, and every rank must pass the same: "
            + "; ".join(f"{name}: {_describe_values([facts.get(name) for facts in ranks])}" for name in differing)
        )
    raise ValueError("; ".join(messages))


def _describe_values(values: Sequence[Any]) -> str:
    """Name each value with the ranks that hold it."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on rank{'s' * (len(r) > 1)} {_ranges(r)}" for value, r in holders.items())


def _ranges(ranks: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
