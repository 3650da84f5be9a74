"""A marker for each thread that waits for other ranks, which tells a rank that waits from one that hangs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

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
