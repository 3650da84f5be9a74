"""What the measurements of a Ray cluster say: the problems, in words, and the order in which links are measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_CLOCK_OFFSET_SECONDS = 1.0
_SLOW_FACTOR = 3.0
"""A link is slow if its bandwidth is below the median by more than this factor."""


@dataclass(frozen=True)
class NodeReport:
    """The answers of the probe on one node."""

    address: str
    """The node's address in Ray."""
    versions: dict[str, str]
    """Version by package; empty if the probe did not answer."""
    clock_offset: float | None
    """Seconds by which the node's clock is ahead of the driver's; None if the probe did not answer."""
    failure: str = ""
    """Why the probe did not answer; empty if it did."""


@dataclass(frozen=True)
class Link:
    """The measurements of the link between two nodes."""

    latency: float
    """Seconds of a round trip."""
    bandwidth: float
    """Bytes per second."""


def disjoint_pairs(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of pairs of the integers below `count`: each pair is in one round, each integer once in a round.

    Example:
        >>> list(disjoint_pairs(4))
        [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    # The circle method: the first stays, the others move by one place a round. With an odd count, one pauses.
    circle = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        if round_ := sorted((min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0):
            yield round_
        circle = [circle[0], circle[-1], *circle[1:-1]]


def find_problems(nodes: list[NodeReport], links: dict[tuple[str, str], Link | str]) -> list[str]:
    """Return the problems of a cluster, in words.

    Args:
        nodes: the report of each node.
        links: for each two nodes, by address, the measurements, or why there are none.
    """
    silent = [f"node {node.address}: {node.failure}" for node in nodes if node.failure]
    return [*silent, *_clock_problems(nodes), *_version_conflicts(nodes), *_link_problems(links)]


def _clock_problems(nodes: list[NodeReport]) -> list[str]:
    return [
        f"the clock of node {node.address} is {node.clock_offset:+.1f} s off: run NTP"
        for node in nodes
        if node.clock_offset is not None and abs(node.clock_offset) > _MAX_CLOCK_OFFSET_SECONDS
    ]


def _version_conflicts(nodes: list[NodeReport]) -> list[str]:
    problems = []
    for package in sorted({package for node in nodes for package in node.versions}):
        addresses: dict[str, list[str]] = {}
        for node in nodes:
            if node.versions:
                addresses.setdefault(node.versions.get(package, "none"), []).append(node.address)
        if len(addresses) > 1:
            by_version = "; ".join(f"{version} on {', '.join(names)}" for version, names in addresses.items())
            problems.append(f"nodes have different versions of {package}: {by_version}")
    return problems


def _link_problems(links: dict[tuple[str, str], Link | str]) -> list[str]:
    broken = [f"{a} and {b}: {reason}" for (a, b), reason in links.items() if isinstance(reason, str)]
    measured = {pair: link for pair, link in links.items() if isinstance(link, Link)}
    if len(measured) < 3:  # Too few to tell which is unusual.
        return broken
    median = statistics.median(link.bandwidth for link in measured.values())
    return broken + [
        f"{a} and {b} exchange {link.bandwidth / 1e9:.2f} GB/s, and the median is {median / 1e9:.2f}"
        for (a, b), link in measured.items()
        if link.bandwidth * _SLOW_FACTOR < median
    ]
