"""Write dev.txt and train.txt next to this file, from the report of a pip that resolved the `dev` extra.

pip install --dry-run --ignore-installed --report REPORT torch==X --editable '.[dev]'
python requirements/lock.py REPORT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

PROJECT = "longnet-dist"
HEADER = "# Written by `make lock`: {what}, with all that it needs.\n"


def main(report: Path) -> None:
    """Pin everything in the report in dev.txt, and what the package needs without extras in train.txt."""
    packages = {canonicalize_name(p["metadata"]["name"]): p for p in json.loads(report.read_text())["install"]}
    _write("dev.txt", "every extra", set(packages) - {PROJECT}, packages)
    _write("train.txt", "the package without extras", _runtime_packages(packages), packages)


def _runtime_packages(packages: dict[str, Any]) -> set[str]:
    """Return the packages that the project needs without extras, directly or not."""
    visited, waiting = set(), [(PROJECT, "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        for line in packages[name]["metadata"].get("requires_dist", []):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in visited} - {PROJECT}


def _write(file: str, what: str, names: set[str], packages: dict[str, Any]) -> None:
    # Drop the local part of a version such as 2.13.0+cpu, which depends on the machine.
    pins = [f"{name}=={packages[name]['metadata']['version'].partition('+')[0]}\n" for name in sorted(names)]
    Path(__file__).with_name(file).write_text(HEADER.format(what=what) + "".join(pins))
    print(f"requirements/{file}: {len(pins)} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
