"""The actors of a gang: formed in one placement group, asked all at once, and formed again when one is lost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longnet_dist.integrations.ray.rank import Rank
from longnet_dist.integrations.ray.store import StoreActor

_GRACE_SECONDS = 5.0


class GangError(RuntimeError):
    """A rank of the gang is lost, or does not answer; the gang forms again by itself, and the next call works."""

    def __init__(self, message: str, rank: int | None = None, node: str | None = None) -> None:
        super().__init__(message)
        self.rank, self.node = rank, node


class Crew:
    """The actors, rank by rank; see `SequenceParallelGang` for its arguments."""

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
        self.where: list[dict[str, Any]] = []
        """Process and node of each rank."""
        self.formed = 0
        """How often."""
        self.closing = threading.Event()
        """Set it, and what is waited for in forming is given up."""
        self._actors: list[Any] = []
        self._store: Any = None
        self._group: Any = None

    def see_that_all_live(self) -> None:
        """Form where it is not formed, or where an actor ended since the last call.

        Raises:
            GangError: where it cannot form in time, with what is lacking.
        """
        if self._actors:
            pings = [actor.where.remote() for actor in self._actors]
            ready, _ = ray.wait(pings, num_returns=len(pings), timeout=_GRACE_SECONDS)
            if len(ready) == len(pings) and all(map(_result_of, pings)):
                return
            self.end()
        self._form()

    def run(self, name: str, num_rows: int, arguments: list[list[Any]]) -> list[Any]:
        """Have every rank `run` the same, each with its own arguments; their answers, in order.

        Raises:
            GangError: where a rank is lost, or does not answer in time; the crew is ended then.
            ValueError: where every rank says so.
        """
        self.see_that_all_live()
        sent = [actor.run.remote(name, num_rows, *given) for actor, given in zip(self._actors, arguments, strict=True)]
        try:
            return self._collect(sent, f"in {name} of {num_rows:,} rows")
        except GangError:
            self.end()
            raise

    def stats(self) -> list[dict[str, Any]]:
        """Of each rank; of one that does not answer, where it was, and `answers` False."""
        asked = [actor.stats.remote() for actor in self._actors]
        ray.wait(asked, num_returns=len(asked), timeout=_GRACE_SECONDS)
        return [
            _result_of(question) or at | {"answers": False} for question, at in zip(asked, self.where, strict=False)
        ]

    def progress(self) -> float:
        """Of the slowest rank; 0 where one does not say."""
        said = [actor.progress.remote() for actor in self._actors]
        with contextlib.suppress(RayError):
            return float(min(ray.get(said, timeout=_GRACE_SECONDS), default=0.0))
        return 0.0

    def end(self) -> None:
        """End the actors; what they reserved stays reserved."""
        for actor in [*self._actors, *([self._store] if self._store is not None else [])]:
            ray.kill(actor, no_restart=True)
        self._actors, self._store = [], None

    def close(self) -> None:
        """End the actors, and give back what they reserved."""
        self.end()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _collect(self, sent: list[Any], doing: str) -> list[Any]:
        ranks = dict(zip(sent, range(self.num_ranks), strict=True))
        results: dict[int, Any] = {}
        failures: dict[int, RayError] = {}
        deadline = time.monotonic() + self.timeout
        while ranks:
            ready, _ = ray.wait(list(ranks), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            rank = ranks.pop(ready[0])
            try:
                results[rank] = ray.get(ready[0])
            except RayError as error:
                if not failures:  # The others fail in its wake; which was first is seen when all have.
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = error
        if not failures and not ranks:
            return [results[rank] for rank in range(self.num_ranks)]
        causes = [error.cause for error in failures.values() if isinstance(error, RayTaskError)]
        if len(causes) == self.num_ranks and all(isinstance(cause, ValueError) for cause in causes):
            raise ValueError(str(causes[0]))
        raise self._lost(failures, sorted(ranks.values()), doing)

    def _lost(self, failures: dict[int, RayError], silent: list[int], doing: str) -> GangError:
        """The error that names the rank which began it."""
        dead = sorted(rank for rank, error in failures.items() if isinstance(error, RayActorError))
        if dead:
            rank, said = dead[0], "died"
        elif silent:
            # One that hangs in a collective still says where it is, in another thread; one that is stopped does not.
            asked = {self._actors[rank].where.remote(): rank for rank in silent}
            _, mute = ray.wait(list(asked), num_returns=len(asked), timeout=_GRACE_SECONDS / 2)
            rank = min((asked[question] for question in mute), default=silent[0])
            said = "did not answer, and the others gave up" if failures else f"did not answer in {self.timeout:g} s"
        else:
            rank = min(failures)
            said = f"failed: {_cause(failures[rank])}"
        at = self.where[rank]
        return GangError(
            f"rank {rank} of {self.num_ranks} (process {at['pid']} on node {at['node']}) {said}, {doing}. The gang "
            "forms again by itself: call again",
            rank,
            at["node"],
        )

    def _form(self) -> None:
        """Reserve, start, and connect the actors, and load the model; all in `form_timeout`."""
        deadline = time.monotonic() + self.form_timeout
        if self._group is None:
            labels = [self.labels] * self.num_ranks if self.labels else None
            bundles = [self.bundle] * self.num_ranks
            self._group = placement_group(bundles, strategy=self.placement, bundle_label_selector=labels)
        if not self._soon(lambda seconds: self._group.wait(seconds), deadline):
            on = f" on nodes of {self.labels}" if self.labels else ""
            raise GangError(
                f"no room for {self.num_ranks} x {self.bundle}{on} ({self.placement}) in {self.form_timeout:g} s: "
                f"the cluster has {ray.cluster_resources()}, of which {ray.available_resources()} is free"
            )
        self._start()
        try:
            self.where = self._all("where", deadline)
            one_node = len({at["node"] for at in self.where}) == 1
            self._all("join", deadline, self._store, None if self.model is None else str(self.model), one_node)
        except RayError as error:
            self.end()
            said = (str(_cause(error)).strip() or repr(error)).splitlines()[0]
            raise GangError(f"the gang of {self.num_ranks} cannot form: {said}") from error
        self.formed += 1

    def _start(self) -> None:
        self._store = self._placed(StoreActor, 0, num_cpus=0, max_concurrency=1000).remote()
        cpus, gpus = self.bundle["CPU"], self.bundle.get("GPU", 0)
        self._actors = [
            self._placed(Rank, rank, num_cpus=cpus, num_gpus=gpus).remote(
                rank, self.num_ranks, max(1, int(cpus)), self.timeout
            )
            for rank in range(self.num_ranks)
        ]

    def _placed(self, kind: type, rank: int, **options: Any) -> Any:
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        groups = {"concurrency_groups": {"status": 1}} if kind is Rank else {}
        return ray.remote(**groups, **options, max_restarts=0, scheduling_strategy=where)(kind)

    def _all(self, method: str, deadline: float, *arguments: Any) -> list[Any]:
        """Every rank's answer to the same, by the deadline."""
        asked = [getattr(actor, method).remote(*arguments) for actor in self._actors]

        def all_ready(seconds: float) -> bool:
            return len(ray.wait(asked, num_returns=len(asked), timeout=seconds)[0]) == len(asked)

        if not self._soon(all_ready, deadline):
            _, late = ray.wait(asked, num_returns=len(asked), timeout=0)
            ranks = ", ".join(str(asked.index(question)) for question in late)
            self.end()
            raise GangError(
                f"the gang of {self.num_ranks} cannot form: rank {ranks} did not {method} in {self.form_timeout:g} s"
            )
        return list(ray.get(asked))

    def _soon(self, true: Callable[[float], bool], deadline: float) -> bool:
        """Whether it becomes true by the deadline; given up when the gang is closed."""
        while not true(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or self.closing.is_set():
                return False
        return True


def connect(dashboard: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or else start one here, which Ray guards with a token."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(address="local", include_dashboard=dashboard)


def _cause(error: RayError) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def _result_of(question: Any) -> Any:
    """What was answered; None where nothing is."""
    try:
        return ray.get(question, timeout=0)
    except RayError:
        return None
