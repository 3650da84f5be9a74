"""Collectives over dimension 0 of a group, each beside its dual. The only file that names them.

No group is the identity. A collective is started, and waited for where its result is needed; both
ends carry a description, so that a failure says which rank, which branch and which ranks.
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
from longnet_dist.distributed.waits import mark_wait

# torch 2.13 deprecates the names that 2.11 has.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MESSAGE_BYTES = 4096


class Communicator:
    """A group of consecutive ranks of a sequence, with a time limit on each of its collectives."""

    def __init__(self, group: ProcessGroup, timeout: timedelta, rank_of_sequence: int) -> None:
        self.group = group
        self.timeout = timeout
        self.size = dist.get_world_size(group)
        self.rank_of_sequence = rank_of_sequence

    def all_gather(self, x: Tensor, what: str) -> Pending:
        """Start: every rank's x, (n, ...) -> (P, n, ...). The dual of `reduce_scatter`."""
        x = x.contiguous()
        gathered = x.new_empty(self.size * x.numel())
        return self._start(
            what, gathered.view(self.size, *x.shape), lambda: _all_gather_single(gathered, x.view(-1), self.group, True)
        )

    def reduce_scatter(self, x: Tensor, what: str) -> Pending:
        """Start: (P, n, ...) -> (n, ...), this rank's part summed over ranks. The dual of `all_gather`."""
        flat = x.contiguous().view(-1)
        mine = x.new_empty(flat.numel() // self.size)
        return self._start(
            what,
            mine.view(x.shape[1:]),
            lambda: _reduce_scatter_single(mine, flat, group=self.group, async_op=True),
        )

    def all_reduce(self, x: Tensor, what: str) -> Tensor:
        """The sum of x over the ranks, on every rank; in place."""
        return self._start(what, x, lambda: dist.all_reduce(x, group=self.group, async_op=True)).wait()

    def agree(self, mine: dict[str, Any], problem: str | None = None) -> None:
        """Check that every rank passes the same `mine`, a small dict, and has no `problem` with it.

        Two numbers are compared, and only where they differ is all exchanged, to say what differs.

        Raises:
            ValueError: on every rank, naming what differs and which ranks hold what, or whose problem.
        """
        text = json.dumps(mine | {"problem": problem} if problem else mine, default=str)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        both = torch.tensor([number, -number, int(problem is not None)], device=self.device)
        doing = "comparing the ranks' arguments"
        work = Pending(self, doing, both)
        work.start(lambda: dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group, async_op=True))
        highest, minus_lowest, anyones_problem = work.wait().tolist()
        if highest == -minus_lowest and not anyones_problem:
            return
        if len(text) > _MESSAGE_BYTES:
            room = _MESSAGE_BYTES // 4 // (1 + len(mine))
            text = json.dumps({name: f"{_ascii(value)[:room]}... {number}" for name, value in mine.items()})
            text = json.dumps({"problem": _ascii(problem)[: _MESSAGE_BYTES // 4]}) if problem else text
        message = torch.frombuffer(bytearray(text.encode().ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        everyones = self.all_gather(message.to(self.device), doing).wait().cpu().numpy()
        _raise_disagreement([json.loads(bytes(row).decode()) for row in everyones])

    @property
    def device(self) -> torch.device:
        """Where a tensor must be that this group exchanges."""
        on_cpu = "cpu:" in str(dist.get_backend_config(self.group))
        return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def _start(self, what: str, result: Tensor, launch: Callable[[], dist.Work]) -> Pending:
        pending = Pending(self, what, result)
        pending.start(launch)
        return pending


class Pending:
    """A collective under way."""

    def __init__(self, communicator: Communicator, what: str, result: Tensor) -> None:
        self.communicator = communicator
        self.what = what
        self.result = result
        self.work: dist.Work | None = None

    def start(self, launch: Callable[[], dist.Work]) -> None:
        """Start it."""
        self.work = self.attributed(launch)

    def wait(self) -> Tensor:
        """The result; on CUDA, ordered into the current stream.

        Raises:
            RuntimeError: where a peer is gone, or does not come within the time limit.
        """
        if self.work is not None:
            work, self.work = self.work, None
            # NCCL would block the host in a wait with a time limit; its watchdog keeps the group's own.
            limit = () if self.result.is_cuda else (self.communicator.timeout,)
            self.attributed(lambda: work.wait(*limit))
        return self.result

    def attributed(self, step: Callable[[], Any]) -> Any:
        """Run `step`; what fails in it is said with the rank, the branch and the ranks it needed."""
        began = time.monotonic()
        try:
            with mark_wait(f"while {self.what}"):
                return step()
        except RuntimeError as error:
            comm = self.communicator
            raise RuntimeError(
                f"rank {comm.rank_of_sequence} of the sequence failed while {self.what}, after "
                f"{time.monotonic() - began:.1f} s (time limit {comm.timeout.total_seconds():g} s). "
                f"A rank of that group ended, or did not make the same call. The cause: {error}"
            ) from error


_COMMUNICATORS: WeakKeyDictionary[ProcessGroup, dict[tuple[int, int, timedelta], Communicator | None]]
_COMMUNICATORS = WeakKeyDictionary()
"""Those made for each group, which live as long as it: many meshes on one group share their connections."""


def communicators(
    group: ProcessGroup, rounds: Sequence[Sequence[tuple[int, int]]], timeout: timedelta
) -> dict[tuple[int, int], Communicator]:
    """Those of (first, last) in `rounds`, ranks of `group`, that this rank is in. Collective over `group`.

    Every rank makes one group a round, alone where the round has none for it: torch names a group by
    how many the process has, so ranks with fewer would wait for each other under different names.
    """
    made = _COMMUNICATORS.setdefault(group, {})
    ranks = dist.get_process_group_ranks(group)
    me = dist.get_rank(group)
    for groups in rounds:
        missing = [(a, b) for a, b in groups if (a, b, timeout) not in made]
        if not missing:
            continue
        first, last = next(((a, b) for a, b in missing if a <= me <= b), (me, me))
        with mark_wait("while creating the process groups of a sequence"):
            subgroup = dist.new_group(ranks[first : last + 1], timeout=timeout, use_local_synchronization=True)
        for a, b in missing:
            made[a, b, timeout] = Communicator(subgroup, timeout, me) if (a, b) == (first, last) else None
    found = {(a, b): made[a, b, timeout] for groups in rounds for a, b in groups}
    return {ranks: communicator for ranks, communicator in found.items() if communicator is not None}


def groups_made() -> int:
    """How many process groups this process has, by which torch names the next one."""
    return internals.num_process_groups()


def level_groups_made(most: int) -> None:
    """Bring `groups_made()` up to `most` with groups of this rank alone; see `communicators`."""
    while groups_made() < most:
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def gather_objects(mine: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's `mine`, a small picklable object, in order of rank; by the default group if none is given.

    Only between ranks of one job, which trust each other.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    with mark_wait("while gathering an object of each rank"):
        dist.all_gather_object(everyones, mine, group=group)
    return everyones


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64, the same on each."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    with mark_wait("while summing the figures of a step"):
        dist.all_reduce(total)
        return total.tolist()


def _ascii(value: Any) -> str:
    """So that its length is known: of ASCII, JSON writes at most two characters for one."""
    return "".join(c if c.isprintable() else " " for c in str(value).encode("ascii", "replace").decode())


def _raise_disagreement(ranks: Sequence[dict[str, Any]]) -> NoReturn:
    said = [f"rank {r}: {given['problem']}" for r, given in enumerate(ranks) if given.get("problem")]
    names = dict.fromkeys(name for given in ranks for name in given if name != "problem")
    if said:  # A rank with a problem may not have come to give the rest.
        names = {name: None for name in names if all(name in given for given in ranks)}
    differing = [name for name in names if any(given.get(name) != ranks[0].get(name) for given in ranks)]
    if differing:
        said.append(
            "the ranks of one sequence disagree, and every rank must pass the same: "
            + "; ".join(f"{name}: {_who_has_what([given.get(name) for given in ranks])}" for name in differing)
        )
    raise ValueError("; ".join(said))


def _who_has_what(values: Sequence[Any]) -> str:
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on rank{'s' * (len(r) > 1)} {_ranges(r)}" for value, r in holders.items())


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
