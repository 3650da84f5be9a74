"""The scripts in examples/ as jobs, and the losses that they print."""

from __future__ import annotations

import re
from pathlib import Path

from tests.launch.jobs import by_accelerate, forked, run


def output_of(example: str, ranks: int = 1, *arguments: object, forks: bool = True) -> str:
    """Run an example to its end, in forked processes or by its own launcher, and return its output."""
    job = (forked if forks else run)(ranks, f"examples/{example}", *arguments)
    assert job.returncode == 0, job.stderr
    return job.stdout


def outputs_with_accelerate(example: str, folder: Path) -> tuple[str, str]:
    """Run an example on one process, and on two that `accelerate launch` starts; return both outputs."""
    return output_of(example), by_accelerate(2, folder, f"examples/{example}")


def losses_in(output: str) -> list[float]:
    """Return the losses of the five steps that an example prints; they must fall."""
    losses = [float(loss) for loss in re.findall(r"step \d+  loss ([\d.]+)", output)]
    assert len(losses) == 5, output
    assert losses[4] < losses[0]
    return losses
