"""One Ray cluster of several nodes on this machine, for all tests that need one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 5}


class Nodes:
    """A head with room for gangs, and nodes for training, each with an address of its own."""

    def __init__(self) -> None:
        # Jobs that are submitted run `python`: this one.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        head = {"num_cpus": 4, "node_ip_address": "127.0.0.2", "_system_config": HEALTH, "include_dashboard": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, log_to_driver=False)
        self._next = 3

    def add(self, pool: str, cpus: int = 1):
        """A node that has the label pool=`pool`, and as much of the resource `pool` as CPUs."""
        address = f"127.0.0.{self._next}"
        self._next += 1
        return self.cluster.add_node(
            num_cpus=cpus, node_ip_address=address, labels={"pool": pool}, resources={pool: cpus}
        )

    def remove(self, node) -> None:
        """Its processes are killed."""
        self.cluster.remove_node(node, allow_graceful=False)

    @property
    def environment(self) -> dict[str, str]:
        """By which a process of its own finds the cluster."""
        return {"RAY_ADDRESS": self.cluster.address, "DASHBOARD": f"http://{self.cluster.webui_url}"}

    def close(self) -> None:
        """End it."""
        ray.shutdown()
        self.cluster.shutdown()
