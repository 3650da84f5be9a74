"""A diagnosis of a Ray cluster: what each node has, and whether and how fast every two nodes exchange data."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longnet_dist import __version__
from longnet_dist.best_effort import print_note
from longnet_dist.distributed.collectives import Communicator
from longnet_dist.integrations.ray.connection import connect
from longnet_dist.integrations.ray.diagnosis import Link, NodeReport, disjoint_pairs, find_problems
from longnet_dist.integrations.ray.store import StoreActor, join_group

_MEBIBYTE = 1 << 20
_MAX_SECONDS = 1e9
_LATENCY_ROUNDS, _BANDWIDTH_ROUNDS = 20, 4


class _Probe:
    """A Ray actor on one node, which reports its software and exchanges data with one other probe at a time."""

    def versions(self) -> dict[str, str]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
            "longnet-dist": __version__,
        }

    def clock(self) -> float:
        return time.time()

    def measure(self, store: Any, rank: int, seconds: float, mebibytes: int, on_gpu: bool) -> Link:
        """Measure the link to the other probe that calls this."""
        store_client = join_group(store, rank, 2, timedelta(seconds=seconds), on_gpu=on_gpu, one_node=False)
        try:
            device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
            assert dist.group.WORLD is not None
            pair = Communicator(dist.group.WORLD, timedelta(seconds=seconds), rank)
            latency = _median_seconds(pair, torch.zeros(1, device=device), _LATENCY_ROUNDS)
            x = torch.zeros(mebibytes * _MEBIBYTE // 4, device=device)
            return Link(latency, x.numel() * 4 / _median_seconds(pair, x, _BANDWIDTH_ROUNDS))
        finally:
            dist.destroy_process_group()
            del store_client  # It had to outlive the group.


@dataclass
class _Node:
    """A node of the cluster, and the probe on it."""

    record: dict[str, Any]
    """The node in `ray.nodes()`."""
    gpus: int = 0
    """Number of GPUs that its probe reserves."""
    probe: Any = None

    @property
    def address(self) -> str:
        return str(self.record["NodeManagerAddress"])

    @property
    def num_gpus(self) -> int:
        return int(self.record["Resources"].get("GPU", 0))

    def start(self) -> None:
        """Start a probe. It reserves no CPU, so it starts next to whatever runs on the node."""
        self.probe = self.place(_Probe, num_gpus=self.gpus)

    def restart(self) -> None:
        """Replace a probe whose exchange failed, because it may hang."""
        ray.kill(self.probe)
        self.start()

    def place(self, actor_class: type, **options: Any) -> Any:
        """Start an actor on this node."""
        strategy = NodeAffinitySchedulingStrategy(self.record["NodeID"], soft=False)
        return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=strategy, **options).remote()


def diagnose_cluster(
    timeout: float = 30.0,
    mebibytes: int = 16,
    nccl: bool = False,
    progress: Callable[[str], None] = print_note,
) -> tuple[str, list[str]]:
    """Diagnose the cluster at RAY_ADDRESS.

    Each node gets a probe. Rounds of disjoint pairs of nodes measure their links at the same time. Probes reserve no
    CPU, and without `nccl` no GPU, so a cluster that is busy can be diagnosed; its load then slows the links.

    Args:
        timeout: time limit in seconds for the probes to start, and of one round.
        mebibytes: size of the messages that measure bandwidth; every two nodes exchange a few.
        nccl: whether nodes with GPUs exchange by NCCL, for which each probe reserves a GPU; by default all use gloo.
        progress: is called with a line of text at each stage.

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
    nodes = [_Node(record) for record in records if record["Alive"]]
    count = f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    lines = [count + (f"; lost since the cluster started: {', '.join(lost)}" if lost else "")]
    progress(f"starting probes on {count}")
    reports = _inspect(nodes, timeout)
    answering = [node for node, report in zip(nodes, reports, strict=True) if not report.failure]
    lines += [_describe(node, report) for node, report in zip(nodes, reports, strict=True) if not report.failure]
    if nccl:
        for node in answering:
            node.gpus = min(1, node.num_gpus)
            node.restart()
    links: dict[tuple[str, str], Link | str] = {}
    rounds = list(disjoint_pairs(len(answering)))
    for number, pairs in enumerate(rounds, start=1):
        progress(f"measuring links: round {number} of {len(rounds)}, {len(pairs)} at a time")
        links |= _measure_round([(answering[a], answering[b]) for a, b in pairs], timeout, mebibytes)
    for node in nodes:
        ray.kill(node.probe)
    if links:
        lines.append(f"every two nodes, by {'NCCL if both have GPUs, else by ' * nccl}gloo ({mebibytes} MiB):")
    lines += [
        f"  {a} - {b}: {link.latency * 1e3:.2f} ms, {link.bandwidth / 1e9:.2f} GB/s"
        for (a, b), link in links.items()
        if isinstance(link, Link)
    ]
    problems = find_problems(reports, links)
    verdict = ["problems:", *(f"  {problem}" for problem in problems)] if problems else ["no problems found"]
    return "\n".join([*lines, "", *verdict]), problems


def _inspect(nodes: list[_Node], timeout: float) -> list[NodeReport]:
    """Start the probes, and return the report of each."""
    for node in nodes:
        node.start()
    calls = [node.probe.versions.remote() for node in nodes]
    ray.wait(calls, num_returns=len(calls), timeout=timeout)
    reports = []
    for node, call in zip(nodes, calls, strict=True):
        versions, failure = _result(call, timeout)
        offset = None
        if not failure:
            offset, failure = _clock_offset(node.probe, timeout)
        reports.append(NodeReport(node.address, versions or {}, offset, failure))
    return reports


def _clock_offset(probe: Any, timeout: float) -> tuple[float | None, str]:
    """Return the seconds by which the probe's clock is ahead of ours at the middle of a round trip, or a failure."""
    start = time.time()
    call = probe.clock.remote()
    ray.wait([call], timeout=timeout)
    middle = (start + time.time()) / 2
    reading, failure = _result(call, timeout)
    return (None if failure else reading - middle), failure


def _measure_round(
    pairs: list[tuple[_Node, _Node]], timeout: float, mebibytes: int
) -> dict[tuple[str, str], Link | str]:
    """Measure the links of disjoint pairs at the same time; return for each what was measured, or why nothing was."""
    stores, calls = [], []
    for a, b in pairs:
        store, on_gpu = a.place(StoreActor, max_concurrency=100), bool(a.gpus and b.gpus)
        stores.append(store)
        options = (timeout / 2, mebibytes, on_gpu)
        calls.append([node.probe.measure.remote(store, rank, *options) for rank, node in enumerate((a, b))])
    ray.wait([call for pair in calls for call in pair], num_returns=2 * len(calls), timeout=timeout)
    links: dict[tuple[str, str], Link | str] = {}
    for (a, b), pair in zip(pairs, calls, strict=True):
        (link, failure), (_, other_failure) = (_result(call, timeout) for call in pair)
        if not failure and not other_failure:
            links[a.address, b.address] = link
            continue
        backend, free = ("NCCL", ", and has each a free GPU") if a.gpus and b.gpus else ("gloo", "")
        reasons = "; ".join(f"{node.address}: {text}" for node, text in ((a, failure), (b, other_failure)) if text)
        links[a.address, b.address] = (
            f"they do not reach each other by {backend} ({reasons}): is a firewall between them{free}?"
        )
        a.restart()
        b.restart()
    for store in stores:
        ray.kill(store)
    return links


def _result(call: Any, timeout: float) -> tuple[Any, str]:
    """Return the result of a call that was waited for, and an empty text; or None and why there is no result."""
    try:
        return ray.get(call, timeout=0), ""
    except GetTimeoutError:
        return None, f"no answer within {timeout:g} s"
    except RayError as error:
        lines = str(error.cause if isinstance(error, RayTaskError) else error).strip().splitlines() or [repr(error)]
        if isinstance(error, RayActorError):  # With a traceback, if the actor could not be made.
            lines = [line for line in lines if "Error: " in line][-1:] or lines
        return None, lines[0].strip()


def _describe(node: _Node, report: NodeReport) -> str:
    resources = node.record["Resources"]
    amounts = ", ".join(_resource(name, amount) for name, amount in resources.items() if ":" not in name)
    model = next((name.removeprefix("accelerator_type:") for name in resources if "accelerator" in name), "GPU")
    gpus = f"{node.num_gpus} x {model}" if node.num_gpus else "no GPU"
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    host = node.record["NodeManagerHostname"]
    return f"  {node.address} ({host}): {gpus}; {amounts}; {versions}; clock {report.clock_offset:+.3f} s"


def _resource(name: str, amount: float) -> str:
    """Format an amount of a resource of Ray, which counts memory in bytes."""
    return f"{name} {amount / 2**30:.1f} GiB" if name.endswith("memory") else f"{name} {amount:.12g}"


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
