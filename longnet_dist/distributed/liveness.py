"""Which ranks' processes on this machine have ended or are stopped: a rank that failed asks, to name the cause."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

_SECONDS = 1.0
"""How long a rank looks for processes that end, because a connection closes shortly before its process is gone."""
_STATES = {"Z": "has ended", "X": "has ended", "T": "is stopped", "t": "is stopped"}

Process = tuple[int, int]
"""A machine (a hash; 0 if unknown), and the number of a process on it."""


def this_process() -> Process:
    """Return this process, as other processes on the machine can find it: those that see the same process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # Not Linux.
        return 0, os.getpid()
    machine = hashlib.sha256(f"{boot} {namespace}".encode()).digest()
    return int.from_bytes(machine[:7], "big"), os.getpid()


def describe_ended(processes: Mapping[int, Process]) -> str:
    """Name the ranks of this machine whose processes have ended or are stopped; empty if none is found.

    Args:
        processes: the process of each rank, by its number for the message.
    """
    machine, _ = this_process()
    here = {rank: pid for rank, (where, pid) in processes.items() if where == machine != 0}
    deadline = time.monotonic() + _SECONDS
    while here:
        found = {rank: state for rank, pid in here.items() if (state := _state(pid))}
        if found:
            return "; ".join(f"the process of rank {rank} ({here[rank]}) {state}" for rank, state in found.items())
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return ""


def _state(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "has ended"
    # The name, in parentheses, may hold any character.
    return _STATES.get(stat.rpartition(")")[2].split()[0])
