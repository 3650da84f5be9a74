"""Waits for other ranks' I/O, with their own time limit and with messages that name the late ranks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from longnet_dist import internals
from longnet_dist.best_effort import print_note
from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.distributed.waits import mark_wait

MESSAGE_SECONDS = 30.0
"""The interval between two messages of one wait."""
STORE_SECONDS = 5.0
"""How long a rank waits for the job's store, which does not answer if the process that holds it is stopped."""
_MAX_NAMED = 8
"""The largest number of ranks that a message names."""


class Patience:
    """A gloo group on which ranks wait for each other's I/O. Its constructor is collective over all ranks.

    Each rank publishes a count of its progress in the job's store. Ranks with a lower count than the
    waiting rank's are late. `gather` raises the count to the next even number, and `arrive` to the odd
    number after it.

    Args:
        limit: the longest time that a rank waits for another.
    """

    def __init__(self, limit: timedelta) -> None:
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.limit = limit.total_seconds()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        self.group = dist.new_group(backend="gloo", timeout=limit) if distributed else None
        self._count = 0
        if self.group is not None:
            self._store = PrefixStore(f"patience/{self.group.group_name}", internals.default_store())
            self._publish()

    def gather(self, value: Any, what: str) -> list[Any]:
        """Return the values of all ranks, in order of rank. Collective.

        Args:
            value: this rank's value, a small picklable object.
            what: what ranks do before they make this call, as in "remove old checkpoints".

        Raises:
            RuntimeError: if a rank does not make the call within the limit; names the rank and `what`.
        """
        self._count += 2 - self._count % 2
        self._publish()
        with self.waiting(what):
            return gather_objects(value, self.group)

    def arrive(self) -> None:
        """Tell the other ranks, inside `waiting`, that this rank has done its part."""
        self._count |= 1
        self._publish()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Print now and then, during a collective operation on `group`, which ranks are late.

        Args:
            what: what ranks do during the operation, as in "write a checkpoint".

        Raises:
            RuntimeError: if the operation fails; names the late ranks and `what` they had to do.
        """
        if self.group is None:
            yield
            return
        started, ended = time.monotonic(), threading.Event()
        # Any rank could print. Two candidates are enough, and spare the store thousands of requests.
        ticker = threading.Thread(target=self._print_waits, args=(what, started, ended), name="patience", daemon=True)
        if self.rank < 2:
            ticker.start()
        try:
            with mark_wait(f"to {what}"):
                yield
        except RuntimeError as error:
            late, seconds = self._late_ranks(), time.monotonic() - started
            who = f"{_describe_ranks(late)} did not {what}" if late else f"rank {self.rank} failed to {what}"
            if late is None:
                who += ", and the job's store, which rank 0 or torchrun holds, does not answer"
            raise RuntimeError(f"{who}, after {seconds:.1f} s (io_timeout {self.limit:g} s): {error}") from error
        finally:
            ended.set()
            if self.rank < 2:
                ticker.join(1.0)

    def _print_waits(self, what: str, started: float, ended: threading.Event) -> None:
        while not ended.wait(MESSAGE_SECONDS):
            late = self._late_ranks()
            # Rank 0 prints, or rank 1 while rank 0 is among the late.
            if self.rank == (late is None or 0 in late) and not ended.is_set():
                who = _describe_ranks(late) if late else "all ranks"
                print_note(f"waiting for {who} to {what} ({time.monotonic() - started:.0f} s)")

    def _publish(self) -> None:
        if self.group is not None:
            # Without the store, messages are less precise; the wait itself does not need it.
            with contextlib.suppress(RuntimeError):
                self._store.set(str(self.rank), str(self._count))

    def _late_ranks(self) -> list[int] | None:
        """Return the ranks whose count is below this rank's; None if the store does not answer."""
        ranks, counts = [str(rank) for rank in range(self.size)], []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                counts.append(self._store.multi_get(ranks) if self._store.check(ranks) else [])

        # A request to a process that is stopped has no time limit.
        request = threading.Thread(target=ask, name="patience", daemon=True)
        request.start()
        request.join(STORE_SECONDS)
        return [rank for rank, count in enumerate(counts[0]) if int(count) < self._count] if counts else None


def _describe_ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MAX_NAMED]))}{more}"
