"""Paths on this machine, as users write them, and files that are written whole."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def local_path(text: str | Path) -> Path:
    """Return the path on this machine that a text names, with `~` expanded and without `file://`.

    Args:
        text: the path as a user wrote it.

    Raises:
        ValueError: if `text` is empty, names an object store, or begins with the home folder of an unknown user.

    Example:
        >>> local_path("file:///data/corpus")
        PosixPath('/data/corpus')
    """
    path = str(text).removeprefix("file://")
    if not path:
        raise ValueError(f"{str(text)!r} names no file or folder; give a path, or leave the option out")
    if re.match(r"[a-z][a-z0-9+.-]*:/", path):
        raise ValueError(
            f"{text} is no path on this machine; only a run folder can be in a store, given as text, s3://BUCKET/PREFIX"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: no home folder is known; for a file of that name give ./{path}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: the file exists with all of its content, or not at all."""
    out = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False)  # noqa: SIM115
    try:
        with out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(out.name, 0o644)
        os.replace(out.name, path)
    except BaseException:
        os.unlink(out.name)
        raise
