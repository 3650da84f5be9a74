"""Checkpoints that survive anything: not there until they are whole, and verified before they are read.

A checkpoint is a folder `step-00000100` with the files of torch.distributed.checkpoint, which reshards,
and `manifest.json`: every file's size and SHA-256, and the facts (step, config, ...). On a file system it
is written under another name and renamed when all ranks are done; in an object store the manifest is
written last (`storage.py`). What then differs from the manifest, a disk or a person altered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from longnet_dist import internals
from longnet_dist.best_effort import BestEffort
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.checkpoints.storage import MANIFEST, Disk, Store, as_os_error, in_store, place
from longnet_dist.distributed.patience import Patience
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.decoder import LongNet

State = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of a run, in `folder`. Its methods are collective over all ranks.

    Args:
        folder: on storage that every rank sees: a path, or one of an object store.
        keep_last: how many of the newest to keep; at least 2, so that one that turns out damaged is not the only.
        keep_every: keep those of every so many steps for good; 0 for none.
        asynchronous: write in the background; training goes on with the next step.
        timeout: how long ranks wait for another rank that reads, writes or removes files.
    """

    def __init__(
        self,
        folder: Path | str,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = False,
        timeout: timedelta = timedelta(hours=1),
    ) -> None:
        self.folder, self.keep_last, self.keep_every = place(folder), keep_last, keep_every
        self.storage = Store(self.folder) if in_store(self.folder) else Disk(self.folder)
        # A group of its own: a background write must not come between the training's collectives.
        self.patience = Patience(timeout)
        self.group, self.rank, self.size = self.patience.group, self.patience.rank, self.patience.size
        self._removal = BestEffort("removals of old checkpoints")
        self.latest: Path | None = None
        """The last one that this run wrote whole; the same on every rank."""
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[Path | None] | None = None

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Write a checkpoint. A disk that is full or fails is a warning: the run, and older checkpoints, go on."""
        self.wait()
        if self._writer is None:
            self.latest = self._write(step, state, facts) or self.latest
            return
        staged = {name: x.detach().cpu().clone() for name, x in state.items()}
        self._writing = self._writer.submit(self._write, step, staged, facts)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there, or has failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.latest = writing.result() or self.latest

    def newest(self, report: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its facts; None where there is none at all.

        Every damaged one that is passed over is reported, with what is wrong with it.

        Raises:
            RuntimeError: where there are checkpoints, and none is whole; or where it cannot be seen what there are.
        """
        names, problem = self._from_first(self._names() if self.rank == 0 else None, "list the checkpoints")
        if problem:
            raise RuntimeError(f"what checkpoints there are cannot be read: {problem}")
        problems = []
        for name in names:
            path = self.folder / name
            problem = self._from_any(_damage(path, self.rank, self.size), f"verify {path}")
            if problem is None:
                return path, json.loads((path / MANIFEST).read_text())["facts"]
            problems.append(f"{path}: {problem}")
            if self.rank == 0:
                report(f"checkpoint {path} is damaged and passed over: {problem}")
        if problems:
            raise RuntimeError("no checkpoint is whole, so the run cannot go on from one: " + "; ".join(problems))
        return None

    def load(self, path: Path, state: State) -> None:
        """Fill the tensors of `state`, of any sharding, from a verified checkpoint; names of others are ignored.

        Raises:
            ValueError: where the checkpoint lacks one of them, or has it in another shape or dtype.
        """
        reader = _Reader(path, self.patience)
        stored = reader.read_metadata().state_dict_metadata
        # A run that goes on on another kind of device begins its random states anew.
        state = {name: x for name, x in state.items() if name in stored or not name.startswith("random")}
        for name, x in state.items():
            have = stored.get(name)
            kind = (have.size, have.properties.dtype) if isinstance(have, TensorStorageMetadata) else None
            if kind != (x.shape, x.dtype):
                raise ValueError(
                    f"{name} is {(x.shape, x.dtype)} in this run and {kind} in checkpoint {path}: use the model "
                    "options and dtype that it was written with, or another run folder"
                )
        with self._alone(), self.patience.waiting(f"read {path}"):
            load(state, storage_reader=reader, process_group=self.group, no_dist=self.group is None)

    def _names(self) -> tuple[list[str], str | None]:
        """Of all checkpoints, the newest first; what went wrong, or None."""
        try:
            return self.storage.names()[::-1], None
        except OSError as error:
            return [], repr(error)

    def _write(self, step: int, state: State, facts: dict[str, Any]) -> Path | None:
        """The checkpoint; None where there is none."""
        name = f"step-{step:08d}"
        nonce = self._from_first(uuid.uuid4().hex[:8], f"begin checkpoint {name}")
        temporary, problem = self._begun(name, nonce)
        problem = self._from_any(problem, f"make the folder of checkpoint {name}")
        if problem is None:
            mine, problem = self._write_files(name, temporary, state)
            files: dict[str, Any] = {}
            for of_rank in self.patience.gather(mine, f"write and hash its files of checkpoint {name}"):
                files |= of_rank
            problem = self._from_any(problem, f"write checkpoint {name}")
        if problem is None:
            problem = self._finish(name, temporary, files, facts) if self.rank == 0 else None
            problem = self._from_first(problem, f"finish checkpoint {name}")
        if problem is None:
            with self._removal:
                if self.rank == 0:
                    self._remove_old(name)
            self._from_first(None, "remove old checkpoints")
        if problem is not None and self.rank == 0:
            warnings.warn(f"no checkpoint of step {step}: {problem}", stacklevel=2)
        if problem is not None or in_store(self.folder):
            self.storage.abandon(temporary)
            self._from_first(None, f"remove what it wrote of checkpoint {name}")
        return self.folder / name if problem is None else None

    def _begun(self, name: str, nonce: str) -> tuple[Path, str | None]:
        """Where this rank writes to; what went wrong, or None."""
        try:
            return self.storage.begin(name, nonce), None
        except OSError as error:
            return self.folder / f"{name}.tmp-{nonce}", repr(error)

    def _write_files(self, name: str, temporary: Path, state: State) -> tuple[dict[str, Any], str | None]:
        """This rank's files, described; or what went wrong, here or elsewhere."""
        try:
            with self._alone(), self.patience.waiting(f"write its files of checkpoint {name}"):
                writer = _Writer(temporary, self.patience)
                save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            written = internals.checkpoint_files(temporary, self.rank)
            described = {file: _described(temporary / file) for file in written}
            self.storage.put(name, temporary, written)
        except CheckpointException as error:  # What failed on any rank; no Exception, so it must be named.
            return {}, "; ".join(f"rank {r}: {e!r}" for r, (e, _) in error.failures.items())
        except OSError as error:
            return {}, repr(error)
        return described, None

    def _finish(self, name: str, temporary: Path, files: dict[str, Any], facts: dict[str, Any]) -> str | None:
        """On rank 0: the manifest; what went wrong, or None."""
        manifest = {"facts": facts, "files": files, "torch": torch.__version__}
        manifest["sha256"] = _hash(manifest)
        try:
            self.storage.finish(name, temporary, json.dumps(manifest, indent=1))
        except OSError as error:
            return repr(error)
        return None

    def _remove_old(self, newest: str) -> None:
        found = self.storage.names()
        # Later ones were passed over, as damaged, or the run would not be here: they must not count as the newest.
        # A store may only have been out of reach: there they stay until their step comes again.
        old = [] if in_store(self.folder) else [name for name in found if name > newest]
        for name in [name for name in found if name <= newest][: -self.keep_last]:
            if not (self.keep_every and int(name.removeprefix("step-")) % self.keep_every == 0):
                old.append(name)
        self.storage.remove(old)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process is no mistake, of which DCP would warn."""
        with warnings.catch_warnings():
            if self.group is None:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def _from_first(self, mine: Any, what: str) -> Any:
        return self.patience.gather(mine, what)[0]

    def _from_any(self, mine: str | None, what: str) -> str | None:
        everyones = enumerate(self.patience.gather(mine, what))
        return next((f"rank {r}: {p}" if self.size > 1 else p for r, p in everyones if p), None)


class _Writer(FileSystemWriter):
    """Tells the ranks that wait when this one has written its files."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        self._patience.arrive()
        return written


class _Reader(TensorsOnlyReader):
    """Tells the ranks that wait when this one has read its part."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        read = super().read_data(plan, planner)
        self._patience.arrive()
        return read


def _damage(path: Path, rank: int, size: int) -> str | None:
    """What is wrong with a checkpoint, looking at this rank's share of its files; None where nothing is."""
    try:
        with as_os_error():
            manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sha256") != _hash(manifest):
            return f"{MANIFEST} is not as it was written"
        files = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    for name, described in sorted(files.items())[rank::size]:
        try:
            if _described(path / name) != described:
                size_now = (path / name).stat().st_size
                return f"{name} is not as it was written ({size_now} bytes now, {described['bytes']} then)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    with as_os_error(), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> State:
    """Every tensor that a run goes on from, by name: parameters, AdamW's moments, this rank's random state.

    Tensors alone, because what is not a tensor would be stored as a pickle.
    """
    state: State = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        moments = optimizer.state[parameter]
        if not moments:  # Before the first step.
            moments["step"] = torch.zeros((), dtype=torch.float32)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state |= {f"optimizer.{moment}.{name}": value for moment, value in moments.items()}
    state[f"random.{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state[f"random_cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def load_model(folder: Path | str) -> LongNet:
    """The model of a run's newest whole checkpoint, on this process alone.

    Args:
        folder: the run's folder.

    Raises:
        FileNotFoundError: where it has no checkpoint.
        RuntimeError: where every one is damaged.
    """
    checkpoints = Checkpoints(place(folder) / "checkpoints")
    found = checkpoints.newest()
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoints/step-*; give the folder of a run that wrote one")
    path, facts = found
    config = LongNetConfig(**facts["config"]["model"])
    model = config.build(dtype=getattr(torch, facts["config"]["dtype"]))
    checkpoints.load(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model


def names_without(state: State, prefixes: Iterable[str]) -> State:
    """Those of `state` whose names begin with none of `prefixes`."""
    return {name: x for name, x in state.items() if not name.startswith(tuple(prefixes))}
