"""Best-effort output: metrics, traces and printed lines, whose failure must not end a run."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO


class BestEffort:
    """A reusable context manager that suppresses exceptions: the first becomes a warning, later ones are ignored.

    Args:
        what: the output that may be missing; a plural noun, with which the warning begins.
    """

    def __init__(self, what: str) -> None:
        self.what, self.failed = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self.failed:
            self.failed = True
            warnings.warn(
                f"{self.what} may be missing or incomplete, and the run continues: {error or repr(error)}", stacklevel=2
            )
        return True


class TolerantStream:
    """A text stream, such as stdout, whose failed writes do not end the run: a closed pipe, or a full disk.

    Args:
        stream: the stream to write to.
        name: its name, for the warning.
    """

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._effort = stream, BestEffort(f"lines printed to {name}")

    def write(self, text: str) -> int:
        """Write `text`; a failure is a warning."""
        with self._effort:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; a failure is a warning."""
        with self._effort:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_note(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, and ignore a failure.

    Args:
        text: the line.
        stream: the stream to print to; stderr by default.
    """
    with contextlib.suppress(Exception):
        print(text, file=stream or sys.stderr, flush=True)


@contextlib.contextmanager
def tolerate_broken_output() -> Iterator[None]:
    """On exit, redirect stdout and stderr to /dev/null if they cannot be flushed.

    The interpreter flushes both at its own exit, and would turn a failure there into exit code 120.
    """
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, stream.fileno())
                    os.close(null)
