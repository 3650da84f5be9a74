"""A failure here means: a module other than collectives.py calls a collective, whose errors then name no rank."""

from __future__ import annotations

import re
from pathlib import Path

import longnet_dist

COLLECTIVES = r"\bdist\.(all_|reduce|broadcast|gather|scatter|barrier|send|recv|isend|irecv|monitored)"


def test_only_collectives_py_calls_collectives():
    package = Path(longnet_dist.__file__).parent
    callers = {p.name for p in package.rglob("*.py") if re.search(COLLECTIVES, p.read_text())}
    assert callers == {"collectives.py"}
