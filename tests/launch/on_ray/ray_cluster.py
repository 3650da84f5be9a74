"""A Ray cluster of several nodes on this machine, shared by all tests that need one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 5}


class Nodes:
    """A head node with room for gangs, and nodes that tests add and remove, each with its own address."""

    def __init__(self) -> None:
        # Submitted jobs run `python`, which must be this interpreter.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        head = {"num_cpus": 4, "node_ip_address": "127.0.0.2", "_system_config": HEALTH, "include_dashboard": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, log_to_driver=False)
        self._next = 3

    def add(self, pool: str, cpus: int = 1):
        """Add a node with the label pool=`pool`, and as many units of the resource `pool` as CPUs."""
        address = f"127.0.0.{self._next}"
        self._next += 1
        return self.cluster.add_node(
            num_cpus=cpus, node_ip_address=address, labels={"pool": pool}, resources={pool: cpus}
        )

    def remove(self, node) -> None:
        """Kill the processes of a node."""
        self.cluster.remove_node(node, allow_graceful=False)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which another process finds the cluster."""
        return {"RAY_ADDRESS": self.cluster.address, "DASHBOARD": f"http://{self.cluster.webui_url}"}

    def close(self) -> None:
        """Shut the cluster down."""
        ray.shutdown()
        self.cluster.shutdown()
