"""Packages that only some users need: named, with how to install them, where an import fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: object) -> Iterator[None]:
    """Import inside: `what` was asked for, and needs the extra `name` of this package.

    Raises:
        ValueError: where a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} needs the package {error.name}: pip install 'longnet-dist[{name}]'") from None
