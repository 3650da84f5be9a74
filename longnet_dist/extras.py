"""Optional packages, and the error that says how to install a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: object) -> Iterator[None]:
    """Inside the context, report the failed import of an optional package as an error with its remedy.

    Args:
        name: The extra of longnet-dist that installs the package, as in `pip install -e '.[name]'` in a checkout.
        what: The option or value that needs the package, as the user wrote it.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what} needs the package {error.name}: pip install -e '.[{name}]' in a checkout") from None
