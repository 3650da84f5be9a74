"""A look at a cluster: what each node has, and whether and how fast every two of them reach each other."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from longnet_dist.distributed.collectives import Communicator
from longnet_dist.integrations.ray.crew import connect
from longnet_dist.integrations.ray.store import StoreActor, join_group

_MEBIBYTE = 1 << 20
_ROUNDS, _SMALL_ROUNDS = 4, 20
_MOST_CLOCK_SECONDS = 1.0
_SLOW = 3.0


class _Probe:
    """On one node: says what is there, and talks to one other at a time."""

    def look(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        }

    def clock(self) -> float:
        return time.time()

    def meet(self, store: Any, rank: int, seconds: float, mebibytes: int, on_gpu: bool) -> dict[str, float]:
        """Seconds of a round trip, and bytes a second of a large one, with the other that calls this."""
        kept = join_group(store, rank, 2, timedelta(seconds=seconds), on_gpu=on_gpu, one_node=False)
        try:
            device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
            assert dist.group.WORLD is not None
            pair = Communicator(dist.group.WORLD, timedelta(seconds=seconds), rank)
            small = _timed(pair, torch.zeros(1, device=device), _SMALL_ROUNDS)
            large = torch.zeros(mebibytes * _MEBIBYTE // 4, device=device)
            return {"latency": small, "bandwidth": large.numel() * 4 / _timed(pair, large, _ROUNDS)}
        finally:
            dist.destroy_process_group()
            del kept


def _timed(pair: Communicator, x: torch.Tensor, rounds: int) -> float:
    pair.all_reduce(x, "meeting")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        pair.all_reduce(x, "meeting")
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def diagnose_cluster(timeout: float = 30.0, mebibytes: int = 16) -> tuple[str, list[str]]:
    """A report for people on the cluster that RAY_ADDRESS names, and what is wrong with it, in words.

    Args:
        timeout: seconds that any one answer, and any one meeting of two nodes, may take.
        mebibytes: exchanged to measure bandwidth, a few times by every two nodes.
    """
    connect()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gone = [node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]]
    wrong: list[str] = []
    probes = {node["NodeID"]: _probe(node) for node in nodes}
    by_id = {node["NodeID"]: node for node in nodes}
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    lines, seen = [f"{len(nodes)} nodes" + (f"; gone since the cluster began: {', '.join(gone)}" if gone else "")], {}
    for node in nodes:
        looked = _answer(probes[node["NodeID"]].look.remote(), timeout)
        if looked is None:
            wrong.append(f"node {names[node['NodeID']]} runs no process of ours within {timeout:g} s")
            continue
        looked["gpus"] = int(node["Resources"].get("GPU", 0))
        seen[node["NodeID"]] = looked
        offset = _clock_offset(probes[node["NodeID"]], timeout)
        if abs(offset) > _MOST_CLOCK_SECONDS:
            wrong.append(f"the clock of node {names[node['NodeID']]} is {offset:+.1f} s off: run NTP")
        lines.append(_described(node, looked, offset))
    wrong += _other_versions(seen, names)
    for probe in probes.values():
        ray.kill(probe)
    lines.append(f"every two of them, by NCCL where both have GPUs, else by gloo ({mebibytes} MiB):")
    met: dict[tuple[str, str], dict[str, float]] = {}
    for a, b in itertools.combinations(seen, 2):
        on_gpu = bool(seen[a]["gpus"] and seen[b]["gpus"])
        backend = "NCCL" if on_gpu else "gloo"
        found = _meet(by_id[a], by_id[b], timeout, mebibytes, on_gpu)
        if found is None:
            wrong.append(f"{names[a]} and {names[b]} do not reach each other by {backend}: is a firewall between them?")
            continue
        met[a, b] = found
        lines.append(f"  {names[a]} - {names[b]}: {found['latency'] * 1e3:.2f} ms, {found['bandwidth'] / 1e9:.2f} GB/s")
    wrong += _slow(met, names)
    return "\n".join(
        [*lines, "", *(["what is wrong:", *(f"  {w}" for w in wrong)] if wrong else ["nothing is wrong"])]
    ), wrong


def _probe(node: dict[str, Any], gpus: int = 0) -> Any:
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=where).remote()


def _answer(question: Any, timeout: float) -> Any:
    try:
        return ray.get(question, timeout=timeout)
    except RayError:
        return None


def _clock_offset(probe: Any, timeout: float) -> float:
    """Seconds by which its clock is ahead, from the middle of a round trip."""
    sent = time.time()
    there = _answer(probe.clock.remote(), timeout)
    return 0.0 if there is None else float(there) - (sent + time.time()) / 2


def _described(node: dict[str, Any], looked: dict[str, Any], offset: float) -> str:
    resources = ", ".join(f"{name} {value:g}" for name, value in node["Resources"].items() if ":" not in name)
    kind = next((name.removeprefix("accelerator_type:") for name in node["Resources"] if "accelerator" in name), "GPU")
    gpus = f"{looked['gpus']} x {kind}" if looked["gpus"] else "no GPU"
    return (
        f"  {node['NodeManagerAddress']} ({node['NodeManagerHostname']}): {gpus}; {resources}; "
        f"python {looked['python']}, torch {looked['torch']}, ray {looked['ray']}; clock {offset:+.3f} s"
    )


def _meet(
    a: dict[str, Any], b: dict[str, Any], timeout: float, mebibytes: int, on_gpu: bool
) -> dict[str, float] | None:
    """By processes of their own: one that did not meet its partner is not asked again."""
    store = ray.remote(StoreActor).options(num_cpus=0, max_concurrency=100).remote()
    probes = [_probe(node, int(on_gpu)) for node in (a, b)]
    asked = [probe.meet.remote(store, rank, timeout / 2, mebibytes, on_gpu) for rank, probe in enumerate(probes)]
    found: list[dict[str, float]] | None = _answer(asked, timeout)
    for actor in (store, *probes):
        ray.kill(actor)
    return None if found is None else found[0]


def _other_versions(seen: dict[str, dict[str, Any]], names: dict[str, str]) -> list[str]:
    said = []
    for what in ("python", "torch", "ray"):
        held: dict[str, list[str]] = {}
        for node, looked in seen.items():
            held.setdefault(looked[what], []).append(names[node])
        if len(held) > 1:
            said.append(
                f"nodes have other versions of {what}: " + "; ".join(f"{v} on {', '.join(n)}" for v, n in held.items())
            )
    return said


def _slow(met: dict[tuple[str, str], dict[str, float]], names: dict[str, str]) -> list[str]:
    if len(met) < 3:
        return []
    usual = statistics.median(found["bandwidth"] for found in met.values())
    return [
        f"{names[a]} and {names[b]} exchange {found['bandwidth'] / 1e9:.2f} GB/s, and others {usual / 1e9:.2f}"
        for (a, b), found in met.items()
        if found["bandwidth"] * _SLOW < usual
    ]
