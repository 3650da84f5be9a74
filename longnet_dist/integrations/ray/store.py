"""Where ranks meet: a store of torch.distributed in a Ray actor. No port of ours listens; TCPStore's is open to all."""

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
# A StoreActor is sent as it is: its process starts without this package and torch, which take seconds to import.
internals.pickle_by_value(sys.modules[__name__])


class StoreActor:
    """The keys and values; Ray's authentication guards them."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def set(self, key: str, value: bytes) -> None:
        """Set a value, and wake who waits for it."""
        async with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    async def add(self, key: str, number: int) -> int:
        """Add to a number, 0 at first; the sum."""
        async with self._changed:
            total = int(self._values.get(key, b"0")) + number
            self._values[key] = str(total).encode()
            self._changed.notify_all()
        return total

    async def get(self, keys: list[str], seconds: float) -> list[bytes] | None:
        """The values, once all are set; None where they are not in time."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: all(key in self._values for key in keys)), seconds
                )
            except TimeoutError:
                return None
            return [self._values[key] for key in keys]

    async def check(self, keys: list[str]) -> bool:
        """Whether all are set."""
        return all(key in self._values for key in keys)

    async def delete(self, key: str) -> bool:
        """Forget a key."""
        return self._values.pop(key, None) is not None


class RayStore(Store):
    """A rank's end of a `StoreActor`. Keep a reference to it: torch holds only what it is in C++."""

    def __init__(self, actor: Any, timeout: timedelta) -> None:
        super().__init__()
        self._actor, self._limit = actor, timeout

    def set(self, key: str, value: str | bytes) -> None:
        """See `torch.distributed.Store`."""
        ray.get(self._actor.set.remote(key, value.encode() if isinstance(value, str) else bytes(value)))

    def get(self, key: str) -> bytes:
        """See `torch.distributed.Store`."""
        return self._get([key], self._limit)[0]

    def add(self, key: str, number: int) -> int:
        """See `torch.distributed.Store`."""
        return int(ray.get(self._actor.add.remote(key, number)))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """See `torch.distributed.Store`."""
        self._get(keys, timeout or self._limit)

    def check(self, keys: list[str]) -> bool:
        """See `torch.distributed.Store`."""
        return bool(ray.get(self._actor.check.remote(keys)))

    def delete_key(self, key: str) -> bool:
        """See `torch.distributed.Store`."""
        return bool(ray.get(self._actor.delete.remote(key)))

    def _get(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        found = ray.get(self._actor.get.remote(keys, timeout.total_seconds()))
        if found is None:
            raise RuntimeError(f"no other rank set {', '.join(keys)} in {timeout.total_seconds():g} s")
        return list(found)


def join_group(actor: Any, rank: int, size: int, timeout: timedelta, *, on_gpu: bool, one_node: bool) -> RayStore:
    """Make this process's default group; returns the store, to keep.

    Ranks listen on the interface by which Ray knows their node; where all are on one node, on its loopback alone.
    """
    interface = "lo" if one_node and sys.platform == "linux" else _interface(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = RayStore(actor, timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


def _interface(address: str) -> str:
    """The network interface that has an IPv4 address; the loopback for all of 127.0.0.0/8."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                given = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # It has none.
            if given == address:
                return name
    return ""
