"""One rank of a gang: the actor that holds a chunk, the model, and its end of the process group."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.ops import dilated_attention
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.inference.embed import embeddings
from longnet_dist.inference.score import log_likelihoods
from longnet_dist.integrations.ray.store import join_group
from longnet_dist.models.decoder import LongNet
from longnet_dist.plan.pattern import Pattern

_MOST_MESHES = 8


@dataclass(frozen=True)
class Rows:
    """Where a rank finds its rows of something: here, or in a file of which it reads no others."""

    value: Tensor | Path
    dim: int = 0

    def read(self, start: int, stop: int) -> Tensor:
        """The rows [start, stop) along `dim`: of a .npy file, or the bytes of any other."""
        if isinstance(self.value, Tensor):
            return self.value
        cut = (slice(None),) * self.dim + (slice(start, stop),)
        return torch.from_numpy(np.array(mapped(self.value)[cut]))


def mapped(path: Path) -> np.ndarray:
    """A .npy file, or the bytes of any other, of which nothing is read yet."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    # What is empty cannot be mapped.
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


class Rank:
    """An actor; its `run` is collective over the gang."""

    def __init__(self, rank: int, size: int, threads: int, timeout: float) -> None:
        torch.set_num_threads(threads)
        self.rank, self.size, self.timeout = rank, size, timedelta(seconds=timeout)
        self.device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        self.model: LongNet | None = None
        self._meshes: OrderedDict[tuple[Pattern, int], SequenceMesh] = OrderedDict()
        self._layers = 0
        self.calls, self.seconds = 0, 0.0

    def join(self, store: Any, folder: str | None, one_node: bool) -> None:
        """Join the process group, and load the model, if there is one."""
        on_gpu = self.device.type == "cuda"
        self._store = join_group(store, self.rank, self.size, self.timeout, on_gpu=on_gpu, one_node=one_node)
        if folder is not None:
            self.model = LongNet.from_pretrained(folder, device=self.device).eval()
            for block in self.model.blocks:
                block.register_forward_hook(self._count_layer)

    def run(self, name: str, num_rows: int, *arguments: Any) -> Any:
        """One of `attention`, `score` and `embed`, by name, on a sequence of `num_rows`."""
        began = time.perf_counter()
        self._layers = 0
        method: Callable[..., Any] = getattr(self, f"_{name}")
        with torch.no_grad():
            result = method(num_rows, *arguments)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - began
        self._layers = 0
        return result

    @ray.method(concurrency_group="status")
    def where(self) -> dict[str, Any]:
        """Which process this is, and on which node."""
        address = ray.util.get_node_ip_address()
        return {"rank": self.rank, "node": address, "host": socket.gethostname(), "pid": os.getpid()}

    @ray.method(concurrency_group="status")
    def progress(self) -> float:
        """How much of the call in progress is done: of the model's layers."""
        return self._layers / max(1, len(self.model.blocks)) if self.model is not None else 0.0

    @ray.method(concurrency_group="status")
    def stats(self) -> dict[str, Any]:
        """What this rank did, and what it holds."""
        used = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return self.where() | {
            "device": str(self.device),
            "calls": self.calls,
            "seconds": self.seconds,
            "memory_bytes": _resident_bytes(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gpu_memory_bytes": used,
        }

    def _attention(
        self, num_rows: int, pattern: Pattern, q: Rows, k: Rows, v: Rows, options: dict[str, Any], out: str | None
    ) -> Any:
        mesh = self._mesh(pattern, num_rows)
        shard = mesh.shard
        parts = self._read(mesh, lambda: [rows.read(shard.start, shard.stop) for rows in (q, k, v)])
        q_BLHD, k_BLGD, v_BLGD = (part.to(self.device) for part in parts)
        result = dilated_attention(q_BLHD, k_BLGD, v_BLGD, pattern, mesh=mesh, **options)
        return self._given(result, out, mesh, dim=1)

    def _score(self, num_rows: int, document: Rows, out: str | None) -> Any:
        mesh, model = self._mesh(self._loaded.config.pattern, num_rows), self._loaded
        shard = mesh.shard
        tokens = self._tokens(mesh, document, shard.start, min(shard.stop + 1, num_rows))
        return self._given(log_likelihoods(model, tokens, mesh)[0], out, mesh, dim=0)

    def _embed(self, num_rows: int, document: Rows, pooling: Literal["mean", "last"] | None, out: str | None) -> Any:
        mesh, model = self._mesh(self._loaded.config.pattern, num_rows), self._loaded
        tokens = self._tokens(mesh, document, mesh.shard.start, mesh.shard.stop)
        result = embeddings(model, tokens, mesh, pooling)[0]
        if pooling is None:
            return self._given(result, out, mesh, dim=0)
        return result.cpu() if self.rank == 0 else None

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
        """What `read` gives; where it fails on one rank, the same error on all, and none waits for it."""
        value, problem = None, None
        try:
            value = read()
        except (OSError, ValueError) as error:
            problem = str(error)
        mesh.agree({"call": "read"}, problem)
        return value

    def _given(self, rows: Tensor, out: str | None, mesh: SequenceMesh, dim: int) -> Any:
        """This rank's rows, to the driver; or into a file of `out`, of which the name goes there."""
        rows = rows.cpu()
        if out is None:
            return rows
        name = f"rows-{mesh.shard.start:014d}-{mesh.shard.start + rows.shape[dim]:014d}.npy"
        if rows.dtype == torch.bfloat16:
            rows = rows.float()  # NumPy has none.
        with (Path(out) / f"{name}.tmp").open("wb") as file:
            np.save(file, rows.numpy(), allow_pickle=False)
        (Path(out) / f"{name}.tmp").rename(Path(out) / name)
        return name

    def _mesh(self, pattern: Pattern, num_rows: int) -> SequenceMesh:
        """Of this pattern and length; the last few are kept."""
        key = (pattern, num_rows)
        if key not in self._meshes:
            group = dist.group.WORLD if self.size > 1 else None
            self._meshes[key] = SequenceMesh(group, pattern, num_rows, timeout=self.timeout)
        self._meshes.move_to_end(key)
        while len(self._meshes) > _MOST_MESHES:
            self._meshes.popitem(last=False)
        return self._meshes[key]

    @property
    def _loaded(self) -> LongNet:
        assert self.model is not None  # The driver has seen to it.
        return self.model

    def _count_layer(self, *_: Any) -> None:
        self._layers += 1


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_files(folder: Path, names: list[str], num_rows: int, dim: int) -> None:
    """Say in `index.json` which file of `folder` holds which rows."""
    (folder / "index.json").write_text(json.dumps({"rows": num_rows, "dim": dim, "files": names}, indent=1) + "\n")
