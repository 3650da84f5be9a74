"""A pool of real processes with gloo groups between them, started once per module.

`pool.run(world, function, *args)` calls `function(group, *args)` on ranks 0..world-1 and returns
their results in order. If a call fails, or exceeds its time limit, the pool ends all processes,
because their state is unknown. The next call starts new ones.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

WORLDS = (1, 2, 4, 8)
GROUP_TIMEOUT = timedelta(seconds=60)


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return the context that starts processes which have already imported what all tests need."""
    context = multiprocessing.get_context("forkserver")
    trainers = ["transformers.models.llama.modeling_llama", "transformers.trainer", "lightning.pytorch"]
    context.set_forkserver_preload(["longnet_dist.training.trainer", *trainers])
    return context


class Pool:
    """Processes that wait for calls; see the module's docstring."""

    def __init__(self) -> None:
        self.context = forkserver()
        self.workers: list[tuple[ForkServerProcess, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, limit: float = 100) -> list[Any]:
        """Call `function(group, *args)` on each of `world` ranks; AssertionError with all tracebacks if one fails."""
        if not self.workers:
            self._start()
        for _, pipe in self.workers[:world]:
            pipe.send((world, function, args))
        deadline = time.monotonic() + limit
        results, failures = [], []
        for rank, (_, pipe) in enumerate(self.workers[:world]):
            answer = _receive(pipe, deadline - time.monotonic())
            results.append(answer[1])
            if answer[0] != "result":
                failures.append(f"--- rank {rank} of {world}: {answer[1]}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers = []

    def _start(self) -> None:
        store = tempfile.mkdtemp(prefix="pool-")
        for rank in range(max(WORLDS)):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_work, args=(rank, f"{store}/store", theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))


def _receive(pipe: Connection, limit: float) -> tuple[str, Any]:
    try:
        return pipe.recv() if pipe.poll(max(0, limit)) else ("late", "no result in time")
    except (EOFError, ConnectionResetError):
        return "gone", "the process ended"


def _work(rank: int, store: str, pipe: Connection) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "no token sees further")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS), timeout=GROUP_TIMEOUT
    )
    groups = {world: dist.new_group(list(range(world)), timeout=GROUP_TIMEOUT) for world in WORLDS}
    while True:
        try:
            world, function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", function(groups[world], *args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
