"""The ways in which a run stops early: on a signal, when its parent process ends, and when a rank hangs."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

from longnet_dist.best_effort import BestEffort, print_note
from longnet_dist.distributed.waits import current_wait

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of a launcher, a user, a closed terminal, and schedulers that announce the end of a job."""
_PR_SET_PDEATHSIG = 1
SAME_SIGNAL_SECONDS = 3.0
"""Signals within this many seconds count as one.

A scheduler signals the launcher and the ranks, and the launcher passes its signal on to the ranks.
"""
_MARKER_BYTES = 400
_MAX_RANKS_LISTED = 16


@dataclass
class StopFlag:
    """Whether a run should stop after the current step."""

    requested: bool = False
    """Stop requested on this rank."""
    agreed: bool = False
    """Stop agreed by all ranks, at the end of a step."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Inside the context, set a flag on the first of `_SIGNALS`, and exit at once on the second.

    Outside the main thread, to which alone Python delivers signals, this does nothing.

    Yields:
        The flag.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    # A thread reads the signal's number from a pipe. So the signal has its effect at once, even while the main thread
    # waits in a collective, when no Python signal handler runs.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader, flag), name="signals", daemon=True)
    handlers_before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    writer_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(writer_before)
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        os.close(writer)
        listener.join()
        os.close(reader)


def _listen(reader: int, flag: StopFlag) -> None:
    """Set the flag at the first signal, end the process at the second, and return when the pipe is closed."""
    first = 0.0
    while data := os.read(reader, 1):
        number = data[0]
        if number not in _SIGNALS:
            continue
        if flag.requested and time.monotonic() - first > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if not flag.requested:
            flag.requested, first = True, time.monotonic()
            name = signal.Signals(number).name
            print_note(f"{name}: finishing the step, then a checkpoint; a second signal exits at once")


def end_with_parent() -> None:
    """Make the kernel end this process when its parent ends, so that a killed launcher leaves no orphans.

    Linux only; does nothing elsewhere.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before the kernel knew.
        os._exit(1)


class Watch:
    """Finds the rank that hangs: on each rank, writes the stack, and what it waits for, if something takes too long.

    Args:
        folder: the run's folder of traces, which every rank sees; `rank-N.txt` in it belongs to rank N.
        rank: this rank.
        num_ranks: the number of all ranks.
        limit: seconds that a collective may take. Traces are written at 80 % of it, or at 90 % if C code hangs that
            holds the interpreter's lock.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, limit: float) -> None:
        self.folder, self.rank, self.num_ranks, self.limit = folder, rank, num_ranks, limit
        self._effort = BestEffort("traces of ranks that hang")

    @contextlib.contextmanager
    def over(self, what: str, limit: float | None = None) -> Iterator[None]:
        """Watch the context's body.

        Args:
            what: a noun phrase for the body, used in errors.
            limit: seconds that the body may take; by default the limit of a collective.

        Raises:
            RuntimeError: if a collective fails; names the ranks that were in none, and where they were.
        """
        limit = limit or self.limit
        with contextlib.ExitStack() as stack:
            with self._effort:
                trace = stack.enter_context(self._open_trace())
                # The watched thread need not be the main one, and a trace holds all threads.
                thread = threading.get_ident()
                trace.write(f"{_thread_id(thread)}\n{'':{_MARKER_BYTES}}\n".encode())
                writer = threading.Timer(0.8 * limit, self._write_trace, (trace, thread))
                writer.daemon = True
                # faulthandler's own thread writes without the interpreter's lock, which C code that hangs may hold. It
                # reads frames that other threads may be freeing, so that it can end a process that is only slow.
                # Therefore it comes second, and the writer, which holds the lock, calls it off.
                faulthandler.dump_traceback_later(0.9 * limit, file=trace)
                writer.start()
                stack.callback(writer.join)
                stack.callback(writer.cancel)  # Runs before the join.
            try:
                yield
            except RuntimeError as error:
                raise RuntimeError(f"{what}: {error}{self._explain_hang()}") from error
            finally:
                faulthandler.cancel_dump_traceback_later()

    def _open_trace(self) -> IO[bytes]:
        """Open this rank's trace file anew, because the file, or its folder, may have been removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: after a failed write, closing a buffered file would write again, and fail again.
        return (self.folder / f"rank-{self.rank}.txt").open("wb", buffering=0)

    def _write_trace(self, trace: IO[bytes], thread: int) -> None:
        """Write the stacks of all threads, and what the watched one waits for into the line after its identifier."""
        faulthandler.cancel_dump_traceback_later()
        if wait := current_wait(thread):
            text = f"waits for other ranks {wait}".encode("ascii", "backslashreplace")[:_MARKER_BYTES]
            with self._effort:
                # Unlike `write`, this does not move the position at which the stacks are written.
                os.pwrite(trace.fileno(), text, len(_thread_id(thread)) + 1)
        with self._effort:
            faulthandler.dump_traceback(trace)

    def _explain_hang(self) -> str:
        """Return lines for an error: the ranks that hang, and what the others wait for. Empty without any trace."""
        states = [_read_state(self.folder / f"rank-{rank}.txt") for rank in range(self.num_ranks)]
        if all(state is None for state in states):
            return ""
        silent, blamed, waiting = [], [], []
        for rank, state in enumerate(states):
            if state is None:
                silent.append(
                    f"rank {rank} wrote no trace: it failed at once, is stopped, is gone, or writes elsewhere"
                )
            elif state.hangs:
                blamed.append(f"rank {rank} is in no collective, so the others wait for it: {state.innermost}")
            elif state.wait:
                waiting.append(f"rank {rank} {state.wait}")
        lines = [line for group in (blamed, silent, waiting) for line in _shorten(group)]
        return "\n".join(["", *lines, f"what every rank was doing is in {self.folder}"])


@dataclass
class _State:
    """What a rank was doing, by its trace."""

    wait: str
    """What it waited for, by the marker; empty without a marker."""
    innermost: str
    """The innermost call of the watched thread."""
    in_torch: bool
    """Whether the thread was in code of torch.distributed. FSDP and DTensor call collectives without a marker."""

    @property
    def hangs(self) -> bool:
        """Whether it is this rank that hangs: it was not waiting for another one."""
        return not self.wait and not self.in_torch


def _read_state(path: Path) -> _State | None:
    """Read a rank's trace file; None if the file holds no stack, or cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    thread, _, rest = text.partition("\n")
    marker, _, stacks = rest.partition("\n")
    # The stack of the thread that the first line names, its innermost call first. A stack begins with "Thread ID", or
    # with "Current thread ID".
    stack = next((block for block in stacks.split("hread ")[1:] if thread and block.startswith(thread)), "")
    frames = [line.strip() for line in stack.splitlines() if line.lstrip().startswith("File ")]
    if not frames:
        return None
    torch_folder = str(Path(dist.__file__).parent).encode("ascii", "backslashreplace").decode()  # As faulthandler does.
    files = [match[1] for frame in frames if (match := re.match('File "(.*)", line ', frame))]
    return _State(marker.strip(), frames[0], any(Path(file).is_relative_to(torch_folder) for file in files))


def _shorten(lines: list[str]) -> list[str]:
    hidden = len(lines) - _MAX_RANKS_LISTED
    return lines if hidden <= 0 else [*lines[:_MAX_RANKS_LISTED], f"... and {hidden} more ranks like these"]


def _thread_id(thread: int) -> str:
    """Return a thread's identifier as faulthandler writes it."""
    return f"0x{thread:016x}"
