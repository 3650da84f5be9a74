"""Waits for other ranks: a marker, which tells a rank that waits from one that hangs, and their time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

import torch

_WAITS: dict[int, str] = {}
"""The purpose of each thread's wait, by the thread's identifier."""


@contextlib.contextmanager
def mark_wait(purpose: str) -> Iterator[None]:
    """Mark this thread, inside the context, as waiting for other ranks.

    If contexts are nested, the purpose of the outermost one stays.

    Args:
        purpose: completes the sentence "It waits for other ranks ...", such as "while gathering keys".
    """
    thread = threading.get_ident()
    if thread in _WAITS:
        yield
        return
    _WAITS[thread] = purpose
    try:
        yield
    finally:
        del _WAITS[thread]


def current_wait(thread: int) -> str | None:
    """Return the purpose of a thread's wait for other ranks; None if the thread does not wait for any.

    Args:
        thread: the identifier of a thread of this process.
    """
    return _WAITS.get(thread)


class Stopwatch:
    """The time in which this process, or the GPU's current stream, waits. No wait of one stream overlaps another."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """The time so far. It waits for the GPU, if that still has to reach the end of a wait."""
        self._collect(finished=False)
        return self._seconds

    @contextlib.contextmanager
    def over(self, on_gpu: bool) -> Iterator[None]:
        """Measure a wait, of the current stream if it is `on_gpu`; nothing while a CUDA graph is captured."""
        if not on_gpu:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            self._collect(finished=True)

    def _collect(self, finished: bool) -> None:
        """Add the times of waits to the sum: of those whose ends the GPU has reached, or of all."""
        while self._events and (not finished or self._events[0][1].query()):
            start, end = self._events.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
