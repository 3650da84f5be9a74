"""A torch.distributed store in a Ray actor, through which the ranks of a process group find each other.

It opens no port, whereas TCPStore opens one on every interface, to anyone (docs/decisions/ray-store.md).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import sys
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from longnet_dist import internals

_SIOCGIFADDR = 0x8915
# A StoreActor is sent as code, so that its process starts without this package and torch, which take seconds to import.
internals.pickle_by_value(sys.modules[__name__])


class StoreActor:
    """A Ray actor that holds the keys and values; Ray's authentication protects them."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def set(self, key: str, value: bytes) -> None:
        """Set a value and wake the callers that wait for it."""
        async with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    async def add(self, key: str, number: int) -> int:
        """Add to a number, initially 0, and return the sum."""
        async with self._changed:
            total = int(self._values.get(key, b"0")) + number
            self._values[key] = str(total).encode()
            self._changed.notify_all()
        return total

    async def get(self, keys: list[str], seconds: float) -> list[bytes] | None:
        """Wait for all keys and return their values; None if one is missing after `seconds`."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: all(key in self._values for key in keys)), seconds
                )
            except TimeoutError:
                return None
            return [self._values[key] for key in keys]

    async def check(self, keys: list[str]) -> bool:
        """Return whether all keys are set."""
        return all(key in self._values for key in keys)

    async def delete(self, key: str) -> bool:
        """Delete a key, and return whether it was set."""
        return self._values.pop(key, None) is not None


class RayStore(Store):
    """A rank's client of a `StoreActor`.

    Keep a reference to it: torch keeps alive only the C++ part of the object.

    Args:
        actor: the handle of the `StoreActor`.
        timeout: how long `get` and `wait` wait for keys.
    """

    def __init__(self, actor: Any, timeout: timedelta) -> None:
        super().__init__()
        self._actor, self._timeout = actor, timeout

    def set(self, key: str, value: str | bytes) -> None:
        """See `torch.distributed.Store`."""
        ray.get(self._actor.set.remote(key, value.encode() if isinstance(value, str) else bytes(value)))

    def get(self, key: str) -> bytes:
        """See `torch.distributed.Store`."""
        return self._get([key], self._timeout)[0]

    def add(self, key: str, number: int) -> int:
        """See `torch.distributed.Store`."""
        return int(ray.get(self._actor.add.remote(key, number)))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """See `torch.distributed.Store`."""
        self._get(keys, timeout or self._timeout)

    def check(self, keys: list[str]) -> bool:
        """See `torch.distributed.Store`."""
        return bool(ray.get(self._actor.check.remote(keys)))

    def delete_key(self, key: str) -> bool:
        """See `torch.distributed.Store`."""
        return bool(ray.get(self._actor.delete.remote(key)))

    def _get(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        values = ray.get(self._actor.get.remote(keys, timeout.total_seconds()))
        if values is None:
            raise RuntimeError(f"no other rank set {', '.join(keys)} in {timeout.total_seconds():g} s")
        return list(values)


def join_group(actor: Any, rank: int, size: int, timeout: timedelta, *, on_gpu: bool, one_node: bool) -> RayStore:
    """Create this process's default process group.

    Ranks listen on the network interface of their node's address in Ray, or only on the loopback interface if all are
    on one node.

    Args:
        actor: the handle of the `StoreActor` that all ranks share.
        rank: the index of this process.
        size: number of processes.
        timeout: time limit of one collective, and of waiting for the other ranks.
        on_gpu: whether the ranks use NCCL for CUDA tensors.
        one_node: whether all ranks are on one node.

    Returns:
        The store, to be kept as long as the group.
    """
    interface = "lo" if one_node and sys.platform == "linux" else _interface(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = RayStore(actor, timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


def _interface(address: str) -> str:
    """Return the name of the network interface with this IPv4 address; the loopback interface for 127.0.0.0/8."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                own_address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # The interface has no IPv4 address.
            if own_address == address:
                return name
    return ""
