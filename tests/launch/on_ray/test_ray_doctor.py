"""A failure here means: the doctor of a cluster needs what a running job holds, or misses a node that is cut off."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def doctor(nodes, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longnet_dist", "doctor", "--cluster", *options]
    environment = os.environ | nodes.environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
def test_the_doctor_reports_on_a_cluster_that_is_busy(ray_nodes):
    """All CPUs are reserved. The command lists each node, measures each link, and finds what is wrong.

    First nothing is. Then a node joins whose process groups have no network interface.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = [ray_nodes.add("doctor")]
    job = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert job.wait(20)
    assert not ray.available_resources().get("CPU")
    try:
        done = doctor(ray_nodes)
        variables = {"GLOO_SOCKET_IFNAME": "nowhere0"}
        nodes.append(ray_nodes.cluster.add_node(num_cpus=0, node_ip_address="127.0.0.200", env_vars=variables))
        cut_off = doctor(ray_nodes, "--timeout", "20")
        hurried = doctor(ray_nodes, "--timeout", "0.001")
    finally:
        remove_placement_group(job)
        for node in nodes:
            ray_nodes.remove(node)
    for address in ("127.0.0.2", nodes[0].node_ip_address):
        line = rf"{address} .*no GPU; .*memory [\d.]+ GiB.*torch 2.*clock [+-]0"
        assert re.search(line, done.stdout), done.stdout + done.stderr
    assert len(re.findall(r"127.* - 127.*: [\d.]+ ms, [\d.]+ GB/s", done.stdout)) == 1
    assert not re.search(r"\de[+-]\d", done.stdout), done.stdout
    assert "no problems found" in done.stdout
    assert "measuring links: round 1 of 1, 1 at a time" in done.stderr
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"127.* - 127.*: [\d.]+ ms, [\d.]+ GB/s", cut_off.stdout)) == 1
    assert len(re.findall("they do not reach each other by gloo .*127.0.0.200: .*nowhere0", cut_off.stdout)) == 2
    assert cut_off.returncode == 1, cut_off.stdout
    assert hurried.stdout.count(": no answer within 0.001 s") == 3, hurried.stdout
    assert hurried.returncode == 1
