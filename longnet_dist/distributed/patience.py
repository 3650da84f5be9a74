"""Waiting for other ranks' I/O, with a time limit of its own and messages that name the ranks it waits for."""

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

SAY_SECONDS = 30.0
"""The interval between two messages of one wait."""
_MAX_NAMED = 8


class Patience:
    """A gloo group on which ranks wait for each other's I/O. Its constructor is collective over all ranks.

    Each rank publishes a count of its progress in the job's store, so that a waiting rank sees which
    ranks are behind. The count is even after `gather`, and odd after `arrive`.

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

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Return every rank's `mine`, in order of rank. Collective.

        Args:
            mine: a small picklable object.
            what: what ranks do before they make this call, as in "remove old checkpoints".

        Raises:
            RuntimeError: if a rank does not come within the limit; names the rank and `what`.
        """
        self._count += 2 - self._count % 2
        self._publish()
        with self.waiting(what):
            return gather_objects(mine, self.group)

    def arrive(self) -> None:
        """Tell the other ranks, inside `waiting`, that this rank's part is done."""
        self._count |= 1
        self._publish()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Print now and then, during a collective operation on `group`, which ranks it waits for.

        Raises:
            RuntimeError: if the operation fails; names the ranks that are behind and `what` they had to do.
        """
        if self.group is None:
            yield
            return
        began, over = time.monotonic(), threading.Event()
        # Any rank could print it. Two are enough, and spare the store thousands of requests.
        ticker = threading.Thread(target=self._print_waits, args=(what, began, over), name="patience", daemon=True)
        if self.rank < 2:
            ticker.start()
        try:
            with mark_wait(f"to {what}"):
                yield
        except RuntimeError as error:
            late, seconds = self._late_ranks(), time.monotonic() - began
            who = f"{_describe_ranks(late)} did not {what}" if late else f"rank {self.rank} failed to {what}"
            raise RuntimeError(f"{who}, after {seconds:.1f} s (io_timeout {self.limit:g} s): {error}") from error
        finally:
            over.set()
            if self.rank < 2:
                ticker.join(1.0)

    def _print_waits(self, what: str, began: float, over: threading.Event) -> None:
        while not over.wait(SAY_SECONDS):
            late = self._late_ranks()
            # Rank 0 prints, or rank 1 while rank 0 is late itself.
            if self.rank == (0 in late) and not over.is_set():
                who = _describe_ranks(late) if late else "all ranks"
                print_note(f"waiting for {who} to {what} ({time.monotonic() - began:.0f} s)")

    def _publish(self) -> None:
        if self.group is not None:
            # Without the store, messages are less precise; the wait itself does not need it.
            with contextlib.suppress(RuntimeError):
                self._store.set(str(self.rank), str(self._count))

    def _late_ranks(self) -> list[int]:
        """Return the ranks whose progress is behind this rank's."""
        ranks = [str(rank) for rank in range(self.size)]
        try:
            counts = self._store.multi_get(ranks) if self._store.check(ranks) else []
        except RuntimeError:
            return []
        return [rank for rank, count in enumerate(counts) if int(count) < self._count]


def _describe_ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MAX_NAMED]))}{more}"
