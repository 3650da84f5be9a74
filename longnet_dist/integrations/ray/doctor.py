"""A diagnosis of a Ray cluster: what each node has, and whether and how fast every two nodes exchange data."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longnet_dist.distributed.collectives import Communicator
from longnet_dist.integrations.ray.connection import connect
from longnet_dist.integrations.ray.store import StoreActor, join_group

_MEBIBYTE = 1 << 20
_MAX_SECONDS = 1e9
_LATENCY_ROUNDS, _BANDWIDTH_ROUNDS = 20, 4
_MAX_CLOCK_OFFSET_SECONDS = 1.0
_SLOW_FACTOR = 3.0
"""A link is slow if its bandwidth is below the median by more than this factor."""


@dataclass(frozen=True)
class _Link:
    """The measurements of the link between two nodes."""

    latency: float
    """Seconds of a round trip."""
    bandwidth: float
    """Bytes per second."""


@dataclass(frozen=True)
class _Node:
    """A node on which a probe has run."""

    record: dict[str, Any]
    """The node in `ray.nodes()`."""
    versions: dict[str, str]
    """The versions of Python and of packages."""

    @property
    def address(self) -> str:
        return self.record["NodeManagerAddress"]

    @property
    def num_gpus(self) -> int:
        return int(self.record["Resources"].get("GPU", 0))


class _Probe:
    """A Ray actor on one node, which reports its software and exchanges data with one other probe."""

    def versions(self) -> dict[str, str]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        }

    def clock(self) -> float:
        return time.time()

    def measure(self, store: Any, rank: int, seconds: float, mebibytes: int, on_gpu: bool) -> _Link:
        """Measure the link to the other probe that calls this."""
        store_client = join_group(store, rank, 2, timedelta(seconds=seconds), on_gpu=on_gpu, one_node=False)
        try:
            device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
            assert dist.group.WORLD is not None
            pair = Communicator(dist.group.WORLD, timedelta(seconds=seconds), rank)
            latency = _median_seconds(pair, torch.zeros(1, device=device), _LATENCY_ROUNDS)
            x = torch.zeros(mebibytes * _MEBIBYTE // 4, device=device)
            return _Link(latency, x.numel() * 4 / _median_seconds(pair, x, _BANDWIDTH_ROUNDS))
        finally:
            dist.destroy_process_group()
            del store_client  # It had to outlive the group.


def diagnose_cluster(timeout: float = 30.0, mebibytes: int = 16) -> tuple[str, list[str]]:
    """Diagnose the cluster at RAY_ADDRESS.

    Args:
        timeout: time limit in seconds of one answer, and of the exchange between two nodes.
        mebibytes: size of the messages that measure bandwidth; every two nodes exchange a few.

    Returns:
        A report for people, and the problems in it, in words.

    Raises:
        ValueError: for arguments that cannot work, or if no cluster answers at RAY_ADDRESS.
    """
    if not 0 < timeout <= _MAX_SECONDS or mebibytes < 1:
        raise ValueError(
            f"timeout is {timeout} and mebibytes is {mebibytes}; timeout must be above 0 and at most "
            f"{_MAX_SECONDS:.0e} seconds, and mebibytes at least 1"
        )
    connect()
    records = ray.nodes()
    lost = [record["NodeManagerAddress"] for record in records if not record["Alive"]]
    alive = [record for record in records if record["Alive"]]
    lines = [f"{len(alive)} nodes" + (f"; lost since the cluster started: {', '.join(lost)}" if lost else "")]
    nodes, node_lines, problems = _inspect(alive, timeout)
    lines += [*node_lines, f"every two nodes, by NCCL if both have GPUs, else by gloo ({mebibytes} MiB):"]
    problems += _version_conflicts(nodes)
    links: dict[tuple[str, str], _Link] = {}
    for a, b in itertools.combinations(nodes, 2):
        on_gpu = bool(a.num_gpus and b.num_gpus)
        link = _measure(a.record, b.record, timeout, mebibytes, on_gpu)
        if link is None:
            backend = "NCCL" if on_gpu else "gloo"
            problems.append(
                f"{a.address} and {b.address} do not reach each other by {backend}: is a firewall between them?"
            )
            continue
        links[a.address, b.address] = link
        lines.append(f"  {a.address} - {b.address}: {link.latency * 1e3:.2f} ms, {link.bandwidth / 1e9:.2f} GB/s")
    problems += _slow_links(links)
    verdict = ["problems:", *(f"  {problem}" for problem in problems)] if problems else ["no problems found"]
    return "\n".join([*lines, "", *verdict]), problems


def _inspect(records: list[dict[str, Any]], timeout: float) -> tuple[list[_Node], list[str], list[str]]:
    """Return the nodes that run a probe, a line of the report for each, and the problems."""
    nodes, lines, problems = [], [], []
    probes = [_start_probe(record) for record in records]
    for record, probe in zip(records, probes, strict=True):
        address = record["NodeManagerAddress"]
        versions = _result_or_none(probe.versions.remote(), timeout)
        if versions is None:
            problems.append(f"node {address} did not start a process of ours within {timeout:g} s")
            continue
        node = _Node(record, versions)
        nodes.append(node)
        offset = _clock_offset(probe, timeout)
        if abs(offset) > _MAX_CLOCK_OFFSET_SECONDS:
            problems.append(f"the clock of node {address} is {offset:+.1f} s off: run NTP")
        lines.append(_describe(node, offset))
    for probe in probes:
        ray.kill(probe)
    return nodes, lines, problems


def _start_probe(record: dict[str, Any], gpus: int = 0) -> Any:
    strategy = NodeAffinitySchedulingStrategy(record["NodeID"], soft=False)
    return ray.remote(_Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy).remote()


def _result_or_none(call: Any, timeout: float) -> Any:
    """Return the result of one call or a list of calls; None if it fails or takes too long."""
    try:
        return ray.get(call, timeout=timeout)
    except RayError:
        return None


def _clock_offset(probe: Any, timeout: float) -> float:
    """Return the seconds by which the probe's clock is ahead of ours at the middle of a round trip."""
    start = time.time()
    reading = _result_or_none(probe.clock.remote(), timeout)
    return 0.0 if reading is None else float(reading) - (start + time.time()) / 2


def _describe(node: _Node, offset: float) -> str:
    resources = node.record["Resources"]
    amounts = ", ".join(_resource(name, amount) for name, amount in resources.items() if ":" not in name)
    model = next((name.removeprefix("accelerator_type:") for name in resources if "accelerator" in name), "GPU")
    gpus = f"{node.num_gpus} x {model}" if node.num_gpus else "no GPU"
    versions = ", ".join(f"{package} {version}" for package, version in node.versions.items())
    host = node.record["NodeManagerHostname"]
    return f"  {node.address} ({host}): {gpus}; {amounts}; {versions}; clock {offset:+.3f} s"


def _resource(name: str, amount: float) -> str:
    """Format an amount of a resource of Ray, which counts memory in bytes."""
    return f"{name} {amount / 2**30:.1f} GiB" if name.endswith("memory") else f"{name} {amount:.12g}"


def _measure(a: dict[str, Any], b: dict[str, Any], timeout: float, mebibytes: int, on_gpu: bool) -> _Link | None:
    """Measure the link between two nodes; None if they do not reach each other.

    The probes are new for every two nodes, because one whose exchange failed may hang.
    """
    store = ray.remote(StoreActor).options(num_cpus=0, max_concurrency=100).remote()
    probes = [_start_probe(record, int(on_gpu)) for record in (a, b)]
    calls = [probe.measure.remote(store, rank, timeout / 2, mebibytes, on_gpu) for rank, probe in enumerate(probes)]
    links: list[_Link] | None = _result_or_none(calls, timeout)
    for actor in (store, *probes):
        ray.kill(actor)
    return None if links is None else links[0]


def _median_seconds(pair: Communicator, x: torch.Tensor, rounds: int) -> float:
    pair.all_reduce(x, "meeting")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        pair.all_reduce(x, "meeting")
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _version_conflicts(nodes: list[_Node]) -> list[str]:
    problems = []
    for package in ("python", "torch", "ray"):
        addresses: dict[str, list[str]] = {}
        for node in nodes:
            addresses.setdefault(node.versions[package], []).append(node.address)
        if len(addresses) > 1:
            by_version = "; ".join(f"{version} on {', '.join(names)}" for version, names in addresses.items())
            problems.append(f"nodes have different versions of {package}: {by_version}")
    return problems


def _slow_links(links: dict[tuple[str, str], _Link]) -> list[str]:
    if len(links) < 3:
        return []
    median = statistics.median(link.bandwidth for link in links.values())
    return [
        f"{a} and {b} exchange {link.bandwidth / 1e9:.2f} GB/s, and the median is {median / 1e9:.2f}"
        for (a, b), link in links.items()
        if link.bandwidth * _SLOW_FACTOR < median
    ]
