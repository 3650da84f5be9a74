"""A failure here means: something but collectives.py talks to other ranks, and its errors say nothing."""

from __future__ import annotations

import re
from pathlib import Path

import longnet_dist

COLLECTIVES = r"\bdist\.(all_|reduce|broadcast|gather|scatter|barrier|send|recv|isend|irecv|monitored)"


def test_only_one_file_names_collectives():
    package = Path(longnet_dist.__file__).parent
    named = {p.name for p in package.rglob("*.py") if re.search(COLLECTIVES, p.read_text())}
    assert named == {"collectives.py"}
