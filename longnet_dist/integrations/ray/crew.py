"""The actors of a gang: in one placement group, called all together, and replaced if one is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longnet_dist.integrations.ray.rank import Rank
from longnet_dist.integrations.ray.store import StoreActor

_GRACE_SECONDS = 5.0
_FORMING_STEPS = {"location": "start", "join": "join the process group and load the model"}
"""The methods of `Rank` that form a gang, as verbs for an error message."""


class GangError(RuntimeError):
    """A gang cannot form, or one of its ranks died, failed or did not answer.

    After the loss of a rank the gang re-forms automatically, and the next call works.

    Attributes:
        rank: the rank that was lost; None if the gang cannot form.
        node: the address of the lost rank's node; None if the gang cannot form.
    """

    def __init__(self, message: str, rank: int | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.rank, self.node = rank, node


class Crew:
    """The actors of a gang, one per rank; `SequenceParallelGang` documents the options.

    Args:
        bundle: the resources that each rank reserves, by Ray's names.
        model: the folder of an exported model, or None.
    """

    def __init__(
        self,
        num_ranks: int,
        bundle: dict[str, float],
        labels: dict[str, str] | None,
        placement: str,
        timeout: float,
        form_timeout: float,
        model: Path | None,
    ) -> None:
        self.num_ranks, self.bundle, self.labels, self.placement = num_ranks, bundle, labels, placement
        self.timeout, self.form_timeout, self.model = timeout, form_timeout, model
        self.locations: list[dict[str, Any]] = []
        """The process and node of each rank."""
        self.formed = 0
        """How many times the gang has formed."""
        self.closing = threading.Event()
        """Set this to abandon a gang that is still forming."""
        self._actors: list[Any] = []
        self._store: Any = None
        self._group: Any = None

    def ensure_alive(self) -> None:
        """Form the gang unless every actor answers.

        Raises:
            GangError: if the gang cannot form within `form_timeout`; names the ranks or resources that are missing.
        """
        if self._actors:
            pings = [actor.location.remote() for actor in self._actors]
            ready, _ = ray.wait(pings, num_returns=len(pings), timeout=_GRACE_SECONDS)
            if len(ready) == len(pings) and all(map(_result_or_none, pings)):
                return
            self.kill_actors()
        self._form()

    def run(self, operation: str, num_rows: int, arguments: Sequence[list[Any] | ray.ObjectRef]) -> list[Any]:
        """Run an operation on every rank, each with its own arguments, and return the results by rank.

        Ray replaces an ObjectRef of arguments by its value, on the rank's node.

        Raises:
            GangError: if a rank is lost or does not answer in time; all actors are killed then.
            ValueError: if every rank raises one.
        """
        self.ensure_alive()
        calls = [
            actor.run.remote(operation, num_rows, rank_arguments)
            for actor, rank_arguments in zip(self._actors, arguments, strict=True)
        ]
        try:
            return self._collect(calls, f"{operation} of {num_rows:,} rows")
        except GangError:
            self.kill_actors()
            raise

    def stats(self) -> list[dict[str, Any]]:
        """Return each rank's statistics; for a rank that does not answer, its location and `answers`: False."""
        calls = [actor.stats.remote() for actor in self._actors]
        ray.wait(calls, num_returns=len(calls), timeout=_GRACE_SECONDS)
        return [
            _result_or_none(call) or location | {"answers": False}
            for call, location in zip(calls, self.locations, strict=False)
        ]

    def progress(self) -> float:
        """Return the progress of the slowest rank, from 0 to 1; 0 if a rank does not answer."""
        calls = [actor.progress.remote() for actor in self._actors]
        with contextlib.suppress(RayError):
            return float(min(ray.get(calls, timeout=_GRACE_SECONDS), default=0.0))
        return 0.0

    def kill_actors(self) -> None:
        """Kill the actors and keep their placement group reserved."""
        for actor in [*self._actors, *([self._store] if self._store is not None else [])]:
            ray.kill(actor, no_restart=True)
        self._actors, self._store = [], None

    def close(self) -> None:
        """Kill the actors and release their placement group."""
        self.kill_actors()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _collect(self, calls: list[Any], activity: str) -> list[Any]:
        """Wait for the result of every rank, and raise the error that explains a missing one."""
        pending = dict(zip(calls, range(self.num_ranks), strict=True))
        results: dict[int, Any] = {}
        failures: dict[int, RayError] = {}
        deadline = time.monotonic() + self.timeout
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            rank = pending.pop(ready[0])
            try:
                results[rank] = ray.get(ready[0])
            except RayError as error:
                if not failures:  # One failure makes the other ranks fail: wait for them, to find the first cause.
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = error
        if not failures and not pending:
            return [results[rank] for rank in range(self.num_ranks)]
        causes = [error.cause for error in failures.values() if isinstance(error, RayTaskError)]
        if len(causes) == self.num_ranks and all(isinstance(cause, ValueError) for cause in causes):
            raise ValueError(str(causes[0]))
        raise self._failure(failures, sorted(pending.values()), activity)

    def _failure(self, failures: dict[int, RayError], silent: list[int], activity: str) -> GangError:
        """Return the error that names the rank whose loss made the others fail."""
        dead = sorted(rank for rank, error in failures.items() if isinstance(error, RayActorError))
        if dead:
            rank, event, detail = dead[0], "died", ""
        elif silent:
            # A rank that hangs in a collective still answers from another thread; a stopped process does not.
            pings = {self._actors[rank].location.remote(): rank for rank in silent}
            _, unanswered = ray.wait(list(pings), num_returns=len(pings), timeout=_GRACE_SECONDS / 2)
            rank, event = min((pings[ping] for ping in unanswered), default=silent[0]), "did not answer"
            detail = " before the other ranks gave up" if failures else f" within {self.timeout:g} s"
        else:
            rank, event = min(failures), "failed"
            detail = f": {_cause(failures[rank])}"
        location = self.locations[rank]
        return GangError(
            f"rank {rank} of {self.num_ranks} (process {location['pid']} on node {location['node']}) {event} during "
            f"{activity}{detail}. The gang re-forms automatically: call again",
            rank,
            location["node"],
        )

    def _form(self) -> None:
        """Reserve resources, start the actors, connect them and load the model, all within `form_timeout`."""
        deadline = time.monotonic() + self.form_timeout
        self._reserve(deadline)
        self._start()
        try:
            self.locations = self._call_all("location", deadline)
            one_node = len({location["node"] for location in self.locations}) == 1
            self._call_all("join", deadline, self._store, None if self.model is None else str(self.model), one_node)
        except RayError as error:
            self.kill_actors()
            reason = (str(_cause(error)).strip() or repr(error)).splitlines()[0]
            raise GangError(f"the gang of {self.num_ranks} cannot form: {reason}") from error
        self.formed += 1

    def _reserve(self, deadline: float) -> None:
        if self._group is None:
            labels = [self.labels] * self.num_ranks if self.labels else None
            bundles = [self.bundle] * self.num_ranks
            self._group = placement_group(bundles, strategy=self.placement, bundle_label_selector=labels)
        if not self._wait_until(lambda seconds: self._group.wait(seconds), deadline):
            nodes = f" on nodes with labels {self.labels}" if self.labels else ""
            raise GangError(
                f"no room for {self.num_ranks} x {self.bundle}{nodes} ({self.placement}) in {self.form_timeout:g} s: "
                f"the cluster has {ray.cluster_resources()}, of which {ray.available_resources()} is free"
            )

    def _start(self) -> None:
        self._store = self._in_bundle(StoreActor, 0, num_cpus=0, max_concurrency=1000).remote()
        cpus, gpus = self.bundle["CPU"], self.bundle.get("GPU", 0)
        self._actors = [
            self._in_bundle(Rank, rank, num_cpus=cpus, num_gpus=gpus).remote(
                rank, self.num_ranks, max(1, int(cpus)), self.timeout
            )
            for rank in range(self.num_ranks)
        ]

    def _in_bundle(self, actor_class: type, rank: int, **options: Any) -> Any:
        """Return the class as a Ray actor class that starts in this rank's bundle of the placement group."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        groups = {"concurrency_groups": {"status": 1}} if actor_class is Rank else {}
        return ray.remote(**groups, **options, max_restarts=0, scheduling_strategy=strategy)(actor_class)

    def _call_all(self, method: str, deadline: float, *arguments: Any) -> list[Any]:
        """Call a method of every rank with the same arguments, and return the results by rank."""
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]

        def all_ready(seconds: float) -> bool:
            return len(ray.wait(calls, num_returns=len(calls), timeout=seconds)[0]) == len(calls)

        if not self._wait_until(all_ready, deadline):
            _, late = ray.wait(calls, num_returns=len(calls), timeout=0)
            ranks = ", ".join(str(calls.index(call)) for call in late)
            self.kill_actors()
            raise GangError(
                f"the gang of {self.num_ranks} cannot form: rank {ranks} did not {_FORMING_STEPS[method]} in "
                f"{self.form_timeout:g} s"
            )
        return list(ray.get(calls))

    def _wait_until(self, condition: Callable[[float], bool], deadline: float) -> bool:
        """Return whether the condition, given seconds to wait for it, holds before the deadline and before closing."""
        while not condition(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or self.closing.is_set():
                return False
        return True


def _cause(error: RayError) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def _result_or_none(call: Any) -> Any:
    """Return the result of a call that has ended; None if it failed or still runs."""
    try:
        return ray.get(call, timeout=0)
    except RayError:
        return None
