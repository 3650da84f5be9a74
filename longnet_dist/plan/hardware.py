"""What the planner assumes of the hardware: how fast a rank computes and communicates. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Hardware:
    """The speed of one rank, by which the planner compares strategies.

    Args:
        name: what is described.
        flops: floating-point operations a second in attention, as achieved.
        bandwidth: bytes that a rank receives a second in a collective, as achieved.
        latency: seconds that a collective takes in addition.

    Raises:
        ValueError: if a number is not positive.
    """

    name: str
    flops: float
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "latency"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} of the hardware {self.name} is {getattr(self, field)}; it must be above 0")

    @classmethod
    def read(cls, name_or_file: str | Path) -> Self:
        """Return hardware of `HARDWARE` by its name, or that of a file which `longnet-dist calibrate` wrote.

        Raises:
            ValueError: for an unknown name, or a file that does not hold hardware.
        """
        if str(name_or_file) in HARDWARE:
            return cls(**asdict(HARDWARE[str(name_or_file)]))
        path = Path(name_or_file).expanduser()
        if not path.is_file():
            raise ValueError(
                f"hardware is {str(name_or_file)!r}; it must be one of {', '.join(HARDWARE)}, or a file that "
                "`longnet-dist calibrate` wrote"
            )
        try:
            content = json.loads(path.read_text())
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} does not hold what `longnet-dist calibrate` writes: {error!r}") from None


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("cpu", 5e10, 1e9, 2e-4),
        Hardware("a100", 1.8e14, 2e10, 3e-5),
        Hardware("h100", 4e14, 4e10, 3e-5),
        Hardware("h200", 4e14, 4e10, 3e-5),
        Hardware("b200", 9e14, 4e10, 3e-5),
    )
}
"""Round numbers, estimated: for a GPU with a network port of its own, in bfloat16, and for a CPU core over gloo."""
