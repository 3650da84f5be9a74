"""Checkpoints that survive anything: not there until they are whole, and verified before they are read.

A checkpoint is a folder `step-00000100` with the files of torch.distributed.checkpoint, which reshards,
and `manifest.json`: every file's size and SHA-256, and the facts (step, config, ...). On a file system it
is written under another name and renamed when all ranks are done; in an object store the manifest is
written last (`storage.py`). What then differs from the manifest, a disk or a person altered.
"""

from __future__ import annotations

import contextlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
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
from longnet_dist.checkpoints.verification import State, damage, describe_file, hash_manifest, not_finite
from longnet_dist.distributed.patience import Patience
from longnet_dist.distributed.waits import mark_wait


class CheckpointError(RuntimeError):
    """No checkpoint to resume from can be read, or the last one of a run could not be written."""


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
        self.problem: str | None = None
        """Why the last one that was to be written was not; None where it was."""
        self._found: Path | None = None
        self._unreadable: set[str] = set()
        """Names of those that may be whole, but could not be read: they are never removed."""
        self._damaged: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[Path | None] | None = None

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Write a checkpoint. Where that fails, or the state is not finite, a warning is given and older ones stay."""
        self.wait()
        if self._writer is None:
            self.latest = self._write(step, state, facts) or self.latest
            return
        staged = {name: x.detach().cpu().clone() for name, x in state.items()}
        self._writing = self._writer.submit(self._write, step, staged, facts)

    def withhold(self, step: int, problem: str) -> None:
        """Write no checkpoint of this step, and warn of it with the reason."""
        self.wait()
        self._failed(step, problem)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there, or has failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with mark_wait("to write the checkpoint in the background"):
                self.latest = writing.result() or self.latest

    def describe_newest(self) -> str:
        """The checkpoint from which a later run would resume, in words, and not read again. Collective."""
        self.wait()
        path = self.latest or self._found
        if path is None:
            return "there is no checkpoint to resume from"
        gone = None
        if self.rank == 0:
            try:
                with as_os_error():
                    gone = None if (path / MANIFEST).exists() else "it is gone"
            except OSError as error:
                gone = repr(error)
        gone = self._from_first(gone, f"look for {path}")
        return f"the newest whole checkpoint is {path}" if gone is None else f"the newest was {path}, and {gone}"

    def newest(self, report: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its facts; None where there is none at all.

        Every one that is passed over is reported, with what is wrong with it. One that cannot be read is no proof of
        damage: it is kept, and nothing is written over it.

        Raises:
            CheckpointError: where there are checkpoints, and none is whole; or where they cannot be listed.
        """
        names, problem = self._from_first(self._names() if self.rank == 0 else None, "list the checkpoints")
        if problem:
            raise CheckpointError(f"the checkpoints in {self.folder} cannot be read: {problem}")
        problems = []
        for name in names:
            path = self.folder / name
            problem, damaged = self._examine(path)
            if problem is None:
                self._found = path
                return path, json.loads((path / MANIFEST).read_text())["facts"]
            (self._damaged if damaged else self._unreadable).add(name)
            problems.append(f"{path}: {problem}")
            if self.rank == 0:
                what = "is damaged and passed over" if damaged else "cannot be read, and is passed over and kept"
                report(f"checkpoint {path} {what}: {problem}")
        if problems:
            raise CheckpointError("no checkpoint is whole, so the run cannot go on from one: " + "; ".join(problems))
        return None

    def load(self, path: Path, state: State) -> None:
        """Fill the tensors of `state`, of any sharding, from a verified checkpoint; names of others are ignored.

        Raises:
            ValueError: where the checkpoint lacks one of them, or has it in another shape or dtype.
            CheckpointError: where its files cannot be read.
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
        try:
            with self._alone(), self.patience.waiting(f"read {path}"):
                load(state, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {_failures(error)}") from error

    def _names(self) -> tuple[list[str], str | None]:
        """Of all checkpoints, the newest first; what went wrong, or None."""
        try:
            return self.storage.names()[::-1], None
        except OSError as error:
            return [], repr(error)

    def _write(self, step: int, state: State, facts: dict[str, Any]) -> Path | None:
        """The checkpoint; None where there is none."""
        name = f"step-{step:08d}"
        if problem := self._from_any(self._refusal(name, state), f"check the tensors of checkpoint {name}"):
            self._failed(step, problem)
            return None
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
        if problem is not None or in_store(self.folder):
            self.storage.abandon(temporary)
            self._from_first(None, f"remove what it wrote of checkpoint {name}")
        if problem is not None:
            self._failed(step, problem)
            return None
        self.problem = None
        return self.folder / name

    def _refusal(self, name: str, state: State) -> str | None:
        """Why this rank's state must not be written under this name; None where it may."""
        if name in self._unreadable:
            return f"{self.folder / name} could not be read and may be whole: move it away, or restart the run"
        return not_finite(state)

    def _failed(self, step: int, problem: str) -> None:
        self.problem = problem
        if self.rank == 0:
            warnings.warn(f"no checkpoint of step {step}: {problem}", stacklevel=3)

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
            described = {file: describe_file(temporary / file) for file in written}
            self.storage.put(name, temporary, written)
        except CheckpointException as error:  # What failed on any rank; no Exception, so it must be named.
            return {}, _failures(error)
        except OSError as error:
            return {}, repr(error)
        return described, None

    def _finish(self, name: str, temporary: Path, files: dict[str, Any], facts: dict[str, Any]) -> str | None:
        """On rank 0: the manifest; what went wrong, or None."""
        manifest = {"facts": facts, "files": files, "torch": torch.__version__}
        manifest["sha256"] = hash_manifest(manifest)
        try:
            self.storage.finish(name, temporary, json.dumps(manifest, indent=1))
        except OSError as error:
            return repr(error)
        return None

    def _remove_old(self, newest: str) -> None:
        # What could not be read counts neither as one to keep nor as one to remove: it may be whole.
        found = [name for name in self.storage.names() if name not in self._unreadable]
        old = [name for name in found if name > newest and name in self._damaged]
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

    def _examine(self, path: Path) -> tuple[str | None, bool]:
        """What is wrong with a checkpoint, or None; and whether it is proven to be damaged, by any rank."""
        found = self.patience.gather(damage(path, self.rank, self.size), f"verify {path}")
        problems = [(f"rank {r}: {p}" if self.size > 1 else p, proven) for r, (p, proven) in enumerate(found) if p]
        return max(problems, key=lambda problem: problem[1], default=(None, False))

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


def _failures(error: CheckpointException) -> str:
    return "; ".join(f"rank {r}: {e!r}" for r, (e, _) in error.failures.items())
