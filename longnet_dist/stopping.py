"""Stopping well: on a signal, and when whoever started this process is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


@dataclass
class StopFlag:
    """Whether this rank was told to stop, and whether all ranks agreed, at the end of a step, to."""

    told: bool = False
    agreed: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """While inside, SIGTERM or SIGINT sets the flag, and a second one exits at once.

    In another thread than the main one, which takes no signals, nothing is set up.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def tell(number: int, frame: FrameType | None) -> None:
        if flag.told:
            os._exit(128 + number)
        flag.told = True
        name = signal.Signals(number).name
        print(f"{name}: finishing the step, then a checkpoint; a second signal exits at once", file=sys.stderr)

    before = {number: signal.signal(number, tell) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent ends: a launcher killed alone leaves no orphan that trains on.

    Linux only; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before the kernel was asked.
        os._exit(1)
