"""Checkpoints that survive crashes: invisible until they are complete, and verified before they are read.

A checkpoint is a folder `step-00000100`. It holds the files of torch.distributed.checkpoint (DCP), which can be
loaded with any sharding, and `manifest.json`: the size and SHA-256 of every file, and facts (step, config, ...).

On a file system, a checkpoint is written under another name, and renamed when all ranks are done. In an object
store, the manifest is written last (`storage.py`). So if a file differs from the manifest, it was damaged or
changed after the checkpoint was complete.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from longnet_dist import internals
from longnet_dist.best_effort import BestEffort
from longnet_dist.checkpoints.reader import PatientReader
from longnet_dist.checkpoints.storage import MANIFEST, Disk, Store, as_os_error, in_store, storage_path
from longnet_dist.checkpoints.verification import State, describe_file, find_damage, find_non_finite, hash_manifest
from longnet_dist.checkpoints.writer import PatientWriter
from longnet_dist.distributed.patience import Patience
from longnet_dist.distributed.waits import mark_wait


class CheckpointError(RuntimeError):
    """No checkpoint to resume from can be read, or the last one of a run could not be written."""


class Checkpoints:
    """The checkpoints of a run. Its methods are collective over all ranks.

    Args:
        folder: a folder that every rank sees, on a file system or in an object store.
        keep_last: number of the newest checkpoints to keep; at least 2, because one may turn out to be damaged.
        keep_every: never remove the checkpoints of steps that are multiples of this; 0 for none.
        asynchronous: write in the background, while training continues with the next step.
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
        self.folder, self.keep_last, self.keep_every = storage_path(folder), keep_last, keep_every
        self.storage = Store(self.folder) if in_store(self.folder) else Disk(self.folder)
        # Patience makes a group of its own: a background write must not interleave with training's collectives.
        self.patience = Patience(timeout)
        self.group, self.rank, self.size = self.patience.group, self.patience.rank, self.patience.size
        self._removal = BestEffort("removals of old checkpoints")
        self.latest: Path | None = None
        """The last checkpoint that this run completed; the same on every rank."""
        self.problem: str | None = None
        """Why the last attempt to write a checkpoint failed; None if it succeeded."""
        self._resumed_from: Path | None = None
        self._unreadable: set[str] = set()
        """Names of checkpoints that could not be read, but may be complete. They are never removed."""
        self._damaged: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[Path | None] | None = None

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Write a checkpoint, and then remove old ones.

        If writing fails, or the state holds NaN or infinity, warn, and leave the older checkpoints as they are.

        Args:
            step: number of completed steps, which names the checkpoint.
            state: the tensors to write.
            facts: further values to record, which JSON must be able to represent.
        """
        self.wait()
        if self._writer is None:
            self.latest = self._write(step, state, facts) or self.latest
            return
        staged = {name: x.detach().cpu().clone() for name, x in state.items()}
        self._writing = self._writer.submit(self._write, step, staged, facts)

    def withhold(self, step: int, problem: str) -> None:
        """Warn that no checkpoint of a step is written.

        Args:
            step: number of completed steps.
            problem: the reason, for the warning and for `self.problem`.
        """
        self.wait()
        self._record_failure(step, problem)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written in the background is complete or has failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with mark_wait("to write the checkpoint in the background"):
                self.latest = writing.result() or self.latest

    def describe_newest(self) -> str:
        """Describe the checkpoint from which a later run would resume, without verifying it again."""
        self.wait()
        path = self.latest or self._resumed_from
        if path is None:
            return "there is no checkpoint to resume from"
        problem = None
        if self.rank == 0:
            try:
                with as_os_error():
                    problem = None if (path / MANIFEST).exists() else "it is gone"
            except OSError as error:
                problem = repr(error)
        problem = self._from_first(problem, f"look for {path}")
        if problem is None:
            return f"the newest whole checkpoint is {path}"
        return f"the newest was {path}, and {problem}"

    def newest(self, report: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """Find the newest checkpoint that is complete and undamaged.

        Damaged ones, and those that cannot be read, are reported and passed over. An unreadable checkpoint may be
        undamaged, so it is kept, and never overwritten.

        Args:
            report: receives a message, on rank 0, for each checkpoint that is passed over.

        Returns:
            The checkpoint and its facts; None if there are no checkpoints at all.

        Raises:
            CheckpointError: if none of the checkpoints can be used, or if they cannot be listed.
        """
        names, problem = self._from_first(self._list() if self.rank == 0 else None, "list the checkpoints")
        if problem:
            raise CheckpointError(f"the checkpoints in {self.folder} cannot be read: {problem}")
        problems = []
        for name in names:
            path = self.folder / name
            problem, damaged = self._verify(path)
            if problem is None:
                self._resumed_from = path
                return path, json.loads((path / MANIFEST).read_text())["facts"]
            (self._damaged if damaged else self._unreadable).add(name)
            problems.append(f"{path}: {problem}")
            if self.rank == 0:
                verdict = "is damaged and passed over" if damaged else "cannot be read, and is passed over and kept"
                report(f"checkpoint {path} {verdict}: {problem}")
        if problems:
            raise CheckpointError("no checkpoint is whole, so the run cannot resume from one: " + "; ".join(problems))
        return None

    def load(self, path: Path, state: State) -> None:
        """Fill tensors, of any sharding, from a verified checkpoint.

        Args:
            path: the checkpoint. Tensors in it that `state` does not name are ignored.
            state: the tensors, which are overwritten.

        Raises:
            ValueError: if the checkpoint lacks a tensor, or has it in another shape or dtype.
            CheckpointError: if the checkpoint's files cannot be read, or are not those of a checkpoint.
        """
        reader = PatientReader(path, self.patience)
        try:
            stored = reader.read_metadata().state_dict_metadata
        except (OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        # A run that resumes on another type of device keeps its new random states.
        state = {name: x for name, x in state.items() if name in stored or not name.startswith("random")}
        for name, x in state.items():
            entry = stored.get(name)
            format_ = (entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
            if format_ != (x.shape, x.dtype):
                raise ValueError(
                    f"{name} is {(x.shape, x.dtype)} in this run and {format_} in checkpoint {path}: use the model "
                    "options and dtype that it was written with, or another run folder"
                )
        try:
            with self._without_warning(), self.patience.waiting(f"read {path}"):
                load(state, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {_describe_failures(error)}") from error

    def _list(self) -> tuple[list[str], str | None]:
        """Return the names of all checkpoints, newest first, and the problem, or None."""
        try:
            return self.storage.names()[::-1], None
        except OSError as error:
            return [], repr(error)

    def _write(self, step: int, state: State, facts: dict[str, Any]) -> Path | None:
        """Write a checkpoint, remove old ones, and return its path; if writing fails, warn and return None."""
        name = f"step-{step:08d}"
        if problem := self._from_any(self._reason_to_refuse(name, state), f"check the tensors of checkpoint {name}"):
            self._record_failure(step, problem)
            return None
        nonce = self._from_first(uuid.uuid4().hex[:8], f"begin checkpoint {name}")
        temporary, problem = self._begin(name, nonce)
        problem = self._from_any(problem, f"make the folder of checkpoint {name}")
        if problem is None:
            problem = self._write_and_finish(name, temporary, state, facts)
        if problem is None:
            with self._removal:
                if self.rank == 0:
                    self._remove_old(name)
            self._from_first(None, "remove old checkpoints")
        if problem is not None or in_store(self.folder):
            self.storage.abandon(temporary)
            self._from_first(None, f"remove what it wrote of checkpoint {name}")
        if problem is not None:
            self._record_failure(step, problem)
            return None
        self.problem = None
        return self.folder / name

    def _reason_to_refuse(self, name: str, state: State) -> str | None:
        """Return why this rank's state must not be written under this name, or None."""
        if name in self._unreadable:
            return f"{self.folder / name} could not be read and may be whole: move it away, or restart the run"
        return find_non_finite(state)

    def _record_failure(self, step: int, problem: str) -> None:
        self.problem = problem
        if self.rank == 0:
            warnings.warn(f"no checkpoint of step {step}: {problem}", stacklevel=3)

    def _begin(self, name: str, nonce: str) -> tuple[Path, str | None]:
        """Return the folder into which this rank writes its files, and the problem, or None."""
        try:
            return self.storage.begin(name, nonce), None
        except OSError as error:
            return self.folder / f"{name}.tmp-{nonce}", repr(error)

    def _write_and_finish(self, name: str, temporary: Path, state: State, facts: dict[str, Any]) -> str | None:
        """Write the files of all ranks, then the manifest; return the problem of any rank, or None."""
        files, problem = self._write_files(name, temporary, state)
        all_files: dict[str, Any] = {}
        for files_of_rank in self.patience.gather(files, f"write and hash its files of checkpoint {name}"):
            all_files |= files_of_rank
        problem = self._from_any(problem, f"write checkpoint {name}")
        if problem is None:
            problem = self._finish(name, temporary, all_files, facts) if self.rank == 0 else None
            problem = self._from_first(problem, f"finish checkpoint {name}")
        return problem

    def _write_files(self, name: str, temporary: Path, state: State) -> tuple[dict[str, Any], str | None]:
        """Write this rank's files; return their descriptions, and the problem, or None."""
        try:
            with self._without_warning(), self.patience.waiting(f"write its files of checkpoint {name}"):
                writer = PatientWriter(temporary, self.patience)
                save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            files = internals.checkpoint_files(temporary, self.rank)
            descriptions = {file: describe_file(temporary / file) for file in files}
            self.storage.put(name, temporary, files)
        except CheckpointException as error:  # A BaseException, which `except Exception` would miss.
            return {}, _describe_failures(error)
        except OSError as error:
            return {}, repr(error)
        return descriptions, None

    def _finish(self, name: str, temporary: Path, files: dict[str, Any], facts: dict[str, Any]) -> str | None:
        """Write the manifest; return the problem, or None."""
        manifest = {"facts": facts, "files": files, "torch": torch.__version__}
        manifest["sha256"] = hash_manifest(manifest)
        try:
            self.storage.finish(name, temporary, json.dumps(manifest, indent=1))
        except OSError as error:
            return repr(error)
        return None

    def _remove_old(self, newest: str) -> None:
        # Unreadable checkpoints may be complete. They are not removed, and do not count as the newest.
        names = [name for name in self.storage.names() if name not in self._unreadable]
        old = [name for name in names if name > newest and name in self._damaged]
        for name in [name for name in names if name <= newest][: -self.keep_last]:
            if not (self.keep_every and int(name.removeprefix("step-")) % self.keep_every == 0):
                old.append(name)
        self.storage.remove(old)

    @contextlib.contextmanager
    def _without_warning(self) -> Iterator[None]:
        """Silence DCP's warning when there is a single process."""
        with warnings.catch_warnings():
            if self.group is None:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def _verify(self, path: Path) -> tuple[str | None, bool]:
        """Return the problem of a checkpoint, or None, and whether any rank has proof of damage."""
        findings = self.patience.gather(find_damage(path, self.rank, self.size), f"verify {path}")
        problems = [(self._name_rank(rank, p), proof) for rank, (p, proof) in enumerate(findings) if p]
        return max(problems, key=lambda finding: finding[1], default=(None, False))

    def _from_first(self, value: Any, what: str) -> Any:
        """Return rank 0's value on every rank; `what` names the work before this call, for errors."""
        return self.patience.gather(value, what)[0]

    def _from_any(self, problem: str | None, what: str) -> str | None:
        """Return the first problem of any rank on every rank, or None; `what` is as for `_from_first`."""
        problems = enumerate(self.patience.gather(problem, what))
        return next((self._name_rank(rank, p) for rank, p in problems if p), None)

    def _name_rank(self, rank: int, problem: str) -> str:
        return f"rank {rank}: {problem}" if self.size > 1 else problem


def _describe_failures(error: CheckpointException) -> str:
    return "; ".join(f"rank {r}: {e!r}" for r, (e, _) in error.failures.items())
