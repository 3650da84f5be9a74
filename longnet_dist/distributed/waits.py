"""A marker for each thread that waits for other ranks, which tells a rank that waits from one that hangs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_WAITS: dict[int, str] = {}
"""What each waiting thread waits for, by the thread's identifier."""


@contextlib.contextmanager
def mark_wait(purpose: str) -> Iterator[None]:
    """Mark this thread, inside the context, as waiting for other ranks. The outermost marker of a thread stands.

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
    """Return what a thread of this process waits for; None if it waits for no rank."""
    return _WAITS.get(thread)
