"""What the planner assumes of the hardware: how fast a rank computes and communicates. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


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
