"""Stopping well: on a signal, when whoever started this process is gone, and when a rank hangs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import faulthandler
import os
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
from longnet_dist.distributed import collectives, patience

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
SAME_SIGNAL_SECONDS = 3.0
_WAITING = tuple(
    str(path)
    for path in (
        Path(dist.__file__).parent,
        Path(collectives.__file__),
        Path(patience.__file__),
        Path(concurrent.futures.__file__).parent,
    )
)
"""Where the code of a rank is that waits: in a collective, for another rank's I/O, or for its own background thread."""


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

    # The signal's number comes through a pipe to a thread, so it is seen at once, also while the main thread waits in a
    # collective, where no handler of Python's runs.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader, flag), name="signals", daemon=True)
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    before_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(before_writer)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        listener.join()
        os.close(reader)


def _listen(reader: int, flag: StopFlag) -> None:
    """Set the flag at the first signal, end the process at the second; return when the pipe is closed."""
    first = 0.0
    while said := os.read(reader, 1):
        if said[0] not in _SIGNALS:
            continue
        # A scheduler signals the launcher and its workers at once, and the launcher passes it on: that is one.
        if flag.told and time.monotonic() - first > SAME_SIGNAL_SECONDS:
            os._exit(128 + said[0])
        if not flag.told:
            flag.told, first = True, time.monotonic()
            name = signal.Signals(said[0]).name
            print_note(f"{name}: finishing the step, then a checkpoint; a second signal exits at once")


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


class Watch:
    """Finds the rank that hangs: each writes where it is into `folder` when something takes too long.

    Args:
        folder: of the run, which every rank sees; `rank-N.txt` in it is rank N's.
        rank, num_ranks: this one, and how many there are.
        limit: seconds that a collective may take; traces are written a little before.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, limit: float) -> None:
        self.folder, self.rank, self.num_ranks, self.limit = folder, rank, num_ranks, limit
        self._effort = BestEffort("traces of ranks that hang")

    @contextlib.contextmanager
    def over(self, what: str, limit: float | None = None) -> Iterator[None]:
        """While inside, watch.

        Args:
            what: what is done, for errors.
            limit: seconds that it may take, in place of the limit of collectives.

        Raises:
            RuntimeError: where a collective fails, with who was not in one, and where that was.
        """
        with contextlib.ExitStack() as stack:
            with self._effort:
                trace = stack.enter_context(self._opened())
                # Of this thread, which need not be the main one: see _who_hangs.
                trace.write(f"0x{threading.get_ident():016x}\n".encode())
                # In a thread of the interpreter's own, so also while this one waits in a collective, or hangs.
                faulthandler.dump_traceback_later(0.8 * (limit or self.limit), file=trace)
            try:
                yield
            except RuntimeError as error:
                raise RuntimeError(f"{what}: {error}{self._who_hangs()}") from error
            finally:
                faulthandler.cancel_dump_traceback_later()

    def _opened(self) -> IO[bytes]:
        """Return this rank's trace file, opened anew: somebody may have removed it, or its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would be written again, and fail again, when the file is closed.
        return (self.folder / f"rank-{self.rank}.txt").open("wb", buffering=0)

    def _who_hangs(self) -> str:
        """What to add to an error: nothing where nobody was late."""
        lines, late = [], False
        for rank in range(self.num_ranks):
            text = ""
            with contextlib.suppress(OSError):
                text = (self.folder / f"rank-{rank}.txt").read_text(errors="replace")
            # The block of the thread that the first line names, its innermost call first.
            blocks = text.split("hread ")[1:]
            block = next((block for block in blocks if block.startswith(text[:18])), "")
            frames = [line.strip() for line in block.splitlines() if "File" in line]
            late = late or bool(frames)
            if not frames:
                lines.append(f"rank {rank} wrote no trace: it failed at once, is stopped, is gone, or writes elsewhere")
            elif not any(part in frame for frame in frames for part in _WAITING):
                lines.append(f"rank {rank} is in no collective, so the others wait for it: {frames[0]}")
        return "\n".join(["", *lines, f"what every rank was doing is in {self.folder}"]) if late else ""
