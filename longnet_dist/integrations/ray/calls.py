"""The queue of calls to a gang: one thread runs them in order, and runs a call again if a rank was lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import torch

from longnet_dist.integrations.ray.crew import Crew, GangError
from longnet_dist.integrations.ray.rank import write_index
from longnet_dist.integrations.ray.requests import DeferredRequest, Request, is_number


class Call:
    """A submitted call to a gang; a gang runs its calls in the order of submission."""

    def __init__(self, future: Future[Any], progress: Callable[[], float]) -> None:
        self._future, self._progress = future, progress

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it.

        Args:
            timeout: seconds to wait; None waits as long as the gang's own limits allow.

        Raises:
            GangError: if a rank was lost or did not answer in time.
            ValueError: if `timeout` is no such number, or the call's files cannot be used.
            TimeoutError: if `timeout` expires first; the call keeps running.
        """
        if timeout is not None and not (is_number(timeout) and 0 <= timeout <= threading.TIMEOUT_MAX):
            raise ValueError(f"timeout is {timeout!r}; it must be None, or at least 0 and finite")
        try:
            return self._future.result(timeout)
        except FutureTimeoutError:
            if self._future.done():
                raise
            raise TimeoutError(f"no result in {timeout:g} s; the call keeps running") from None

    def done(self) -> bool:
        """Return whether the call has ended, with a result or an error."""
        return self._future.done()

    def progress(self) -> float:
        """Return the fraction of the model's layers that the slowest rank has computed, from 0 to 1."""
        if self.done():
            return 1.0
        return self._progress() if self._future.running() else 0.0


class CallQueue:
    """Runs requests on a crew, one at a time, in a thread of its own."""

    def __init__(self, crew: Crew) -> None:
        self.counts = {"calls": 0, "failed": 0}
        self._crew = crew
        self._folders: set[Path] = set()
        """The folders of the calls that have not ended."""
        self._thread = ThreadPoolExecutor(1, "gang")

    def submit(self, request: Request | DeferredRequest, retries: int) -> Call:
        """Queue a request, to be repeated up to `retries` times if a rank is lost.

        Raises:
            ValueError: if the request's folder holds a result or will, or cannot be created.
        """
        if request.folder is not None:
            self._reserve(request.folder)
        return Call(self._thread.submit(self._run_once, request, retries), self._crew.progress)

    def close(self, cancel: bool) -> None:
        """Wait for the queued calls; with `cancel`, only for the one that runs."""
        self._thread.shutdown(cancel_futures=cancel)

    def _reserve(self, folder: Path) -> None:
        """Create the folder of a result, unless it holds one, or is another call's."""
        if folder in self._folders or (folder / "index.json").exists():
            raise ValueError(f"{folder} holds results already, or will; give another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be created ({error.strerror}); give another folder") from None
        self._folders.add(folder)

    def _run_once(self, request: Request | DeferredRequest, retries: int) -> Any:
        """Run a request, and release its folder before the caller learns how it ended: the same call may follow."""
        try:
            return self._run(request, retries)
        finally:
            if request.folder is not None:
                self._folders.discard(request.folder)

    def _run(self, request: Request | DeferredRequest, retries: int) -> Any:
        self.counts["calls"] += 1
        if isinstance(request, DeferredRequest):
            request = request.wait(self._crew.timeout)
        for attempt in range(retries + 1):
            try:
                results = self._crew.run(request.operation, request.num_rows, request.arguments)
                break
            except GangError:
                self.counts["failed"] += 1
                if attempt == retries:
                    # Re-form in this thread: the caller gets the error at once, and the next call waits for a new gang.
                    with contextlib.suppress(RuntimeError):  # Raised if the gang was closed in the meantime.
                        self._thread.submit(self._re_form)
                    raise
        if request.folder is not None:
            write_index(request.folder, results, request.num_rows, request.dim)
            return request.folder
        # A pooled embedding and a continuation are complete on the first rank, and the others return None.
        complete = request.operation == "generate" or (request.operation == "embed" and results[-1] is None)
        return results[0] if complete else torch.cat(results, request.dim)

    def _re_form(self) -> None:
        with contextlib.suppress(GangError):  # The next call tries again, and reports its failure.
            self._crew.ensure_alive()
