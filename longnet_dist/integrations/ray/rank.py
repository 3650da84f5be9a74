"""One rank of a gang: the actor that holds a chunk of the sequence, the model, and a place in the process group."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.api import dilated_attention
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.inference.embed import embeddings
from longnet_dist.integrations.ray.rows import Rows
from longnet_dist.integrations.ray.store import join_group
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.generation import Sampling, draw_tokens, last_logits
from longnet_dist.models.loss import log_likelihoods
from longnet_dist.plan.pattern import Pattern

_MAX_MESHES = 8


class Rank:
    """A Ray actor that is one rank of a gang.

    Its `run` is collective over the gang. `location`, `progress` and `stats` run in another thread, so they answer even
    while `run` computes, or hangs in a collective.

    Args:
        rank: the index of this rank.
        size: number of ranks.
        threads: number of threads that torch may use.
        timeout: time limit in seconds of one collective.
    """

    def __init__(self, rank: int, size: int, threads: int, timeout: float) -> None:
        torch.set_num_threads(threads)
        self.rank, self.size, self.timeout = rank, size, timedelta(seconds=timeout)
        self.device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        self.model: LongNet | None = None
        self._meshes: OrderedDict[tuple[Pattern, int], SequenceMesh] = OrderedDict()
        self._layers_done = 0
        self.calls, self.seconds = 0, 0.0

    def join(self, store: Any, folder: str | None, one_node: bool) -> None:
        """Join the process group and load the model.

        Args:
            store: the handle of the gang's `StoreActor`.
            folder: the folder of an exported model; None if the gang has none.
            one_node: whether all ranks are on one node.
        """
        on_gpu = self.device.type == "cuda"
        self._store = join_group(store, self.rank, self.size, self.timeout, on_gpu=on_gpu, one_node=one_node)
        if folder is not None:
            self.model = LongNet.from_pretrained(folder, device=self.device).eval()
            for block in self.model.blocks:
                block.register_forward_hook(self._count_layer)

    def run(self, operation: str, num_rows: int, arguments: list[Any]) -> Any:
        """Run an operation on this rank's part of a sequence. Collective over the gang.

        Args:
            operation: `attention`, `score`, `embed` or `generate`.
            num_rows: N, the length of the whole sequence.
            arguments: the other arguments of the operation.
        """
        start = time.perf_counter()
        self._layers_done = 0
        method: Callable[..., Any] = getattr(self, f"_{operation}")
        with torch.no_grad():
            result = method(num_rows, *arguments)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        self._layers_done = 0
        return result

    @ray.method(concurrency_group="status")
    def location(self) -> dict[str, Any]:
        """Return the rank, its process id, and the address and name of its node."""
        address = ray.util.get_node_ip_address()
        return {"rank": self.rank, "node": address, "host": socket.gethostname(), "pid": os.getpid()}

    @ray.method(concurrency_group="status")
    def progress(self) -> float:
        """Return the fraction of the model's layers that the current call has computed, from 0 to 1."""
        return self._layers_done / max(1, len(self.model.blocks)) if self.model is not None else 0.0

    @ray.method(concurrency_group="status")
    def stats(self) -> dict[str, Any]:
        """Return the location, the number and total seconds of calls, and the memory in use, in bytes."""
        gpu_bytes = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return self.location() | {
            "device": str(self.device),
            "calls": self.calls,
            "seconds": self.seconds,
            "memory_bytes": _resident_bytes(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gpu_memory_bytes": gpu_bytes,
        }

    def _attention(
        self, num_rows: int, pattern: Pattern, q: Rows, k: Rows, v: Rows, options: dict[str, Any], out: str | None
    ) -> Any:
        mesh = self._mesh(pattern, num_rows)
        shard = mesh.shard
        parts = self._read(mesh, lambda: [rows.read(shard.start, shard.stop) for rows in (q, k, v)])
        q_BLHD, k_BLGD, v_BLGD = (part.to(self.device) for part in parts)
        result = dilated_attention(q_BLHD, k_BLGD, v_BLGD, pattern, mesh=mesh, **options)
        return self._return_or_write(result, out, mesh, dim=1)

    def _score(self, num_rows: int, document: Rows, out: str | None) -> Any:
        mesh, model = self._mesh(self._loaded.config.pattern, num_rows), self._loaded
        shard = mesh.shard
        tokens = self._tokens(mesh, document, shard.start, min(shard.stop + 1, num_rows))
        return self._return_or_write(log_likelihoods(model, tokens, mesh)[0], out, mesh, dim=0)

    def _embed(self, num_rows: int, document: Rows, pooling: Literal["mean", "last"] | None, out: str | None) -> Any:
        mesh, model = self._mesh(self._loaded.config.pattern, num_rows), self._loaded
        tokens = self._tokens(mesh, document, mesh.shard.start, mesh.shard.stop)
        result = embeddings(model, tokens, mesh, pooling)[0]
        if pooling is None:
            return self._return_or_write(result, out, mesh, dim=0)
        return result.cpu() if self.rank == 0 else None

    def _generate(
        self, num_rows: int, document: Rows, max_new_tokens: int, sampling: Sampling, stop: Sequence[int], seed: int
    ) -> Tensor | None:
        mesh, model = self._mesh(self._loaded.config.pattern, num_rows), self._loaded
        tokens, cache = self._tokens(mesh, document, mesh.shard.start, mesh.shard.stop), model.new_cache()
        logits = last_logits(model, model.features(tokens, mesh, cache=cache), mesh)
        # Every rank has the whole caches now, and one of them is enough to go on.
        drawn: list[int] = []
        if self.rank == 0:
            for token in draw_tokens(model, logits, cache, max_new_tokens, sampling, seed):
                drawn.append(int(token.item()))
                if drawn[-1] in stop:
                    break
        return torch.tensor(drawn, dtype=torch.int64) if self.rank == 0 else None

    def _tokens(self, mesh: SequenceMesh, document: Rows, start: int, stop: int) -> Tensor:
        def read() -> Tensor:
            ids, size = document.read(start, stop)[: stop - start], self._loaded.config.vocab_size
            if ids.is_floating_point():
                raise ValueError(f"token ids are {ids.dtype}; they must be integers")
            ids = ids.long()
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(
                    f"token ids of rows [{start}, {stop}) are {int(ids.min())} to {int(ids.max())}, and the model's "
                    f"are below {size}"
                )
            return ids

        return self._read(mesh, read)[None].to(self.device)

    def _read(self, mesh: SequenceMesh, read: Callable[[], Any]) -> Any:
        """Return what `read` returns; if it fails on any rank, raise the same error on all. Collective."""
        value, problem = None, None
        try:
            value = read()
        except (OSError, ValueError) as error:
            problem = str(error)
        mesh.agree({"call": "read"}, problem)
        return value

    def _return_or_write(self, rows: Tensor, out: str | None, mesh: SequenceMesh, dim: int) -> Any:
        """Return this rank's rows; with `out`, write them to a file in that folder and return the file's name."""
        rows = rows.cpu()
        if out is None:
            return rows
        name = f"rows-{mesh.shard.start:014d}-{mesh.shard.start + rows.shape[dim]:014d}.npy"
        if rows.dtype == torch.bfloat16:
            rows = rows.float()  # NumPy has no bfloat16.
        with (Path(out) / f"{name}.tmp").open("wb") as file:
            np.save(file, rows.numpy(), allow_pickle=False)
        (Path(out) / f"{name}.tmp").rename(Path(out) / name)
        return name

    def _mesh(self, pattern: Pattern, num_rows: int) -> SequenceMesh:
        """Return the mesh of a pattern and a length; the most recent ones are cached."""
        key = (pattern, num_rows)
        if key not in self._meshes:
            group = dist.group.WORLD if self.size > 1 else None
            self._meshes[key] = SequenceMesh(group, pattern, num_rows, timeout=self.timeout)
        self._meshes.move_to_end(key)
        while len(self._meshes) > _MAX_MESHES:
            self._meshes.popitem(last=False)
        return self._meshes[key]

    @property
    def _loaded(self) -> LongNet:
        assert self.model is not None  # The driver refuses calls that need a model if there is none.
        return self.model

    def _count_layer(self, *_: Any) -> None:
        self._layers_done += 1


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_index(folder: Path, names: list[str], num_rows: int, dim: int) -> None:
    """Write `index.json`, which lists the files of a result in the order of their rows.

    Args:
        folder: the folder of the result.
        names: the name of each rank's file.
        num_rows: N, the number of all rows.
        dim: the dimension of the rows.
    """
    (folder / "index.json").write_text(json.dumps({"rows": num_rows, "dim": dim, "files": names}, indent=1) + "\n")
