"""Paths on this machine, as a user writes them."""

from __future__ import annotations

import re
from pathlib import Path


def local_path(given: str | Path) -> Path:
    """The path on this machine that a text names, with `~` expanded and without `file://`.

    Raises:
        ValueError: if it is empty, lies in a store, or begins with the home folder of an unknown user.
    """
    text = str(given).removeprefix("file://")
    if not text:
        raise ValueError(f"{str(given)!r} names no file or folder; give a path, or leave the option out")
    if re.match(r"[a-z][a-z0-9+.-]*:/", text):
        raise ValueError(
            f"{given} is no path on this machine; a run in a store is given as text, s3://BUCKET/PREFIX, and nothing "
            "else can be in one"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{given}: no home folder is known; for a file of that name give ./{text}") from None
