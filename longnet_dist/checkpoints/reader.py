"""Readers of checkpoints from untrusted sources, which run no code from them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from longnet_dist import internals
from longnet_dist.checkpoints.verification import check_regular, is_plain_name
from longnet_dist.distributed.patience import Patience


class TensorsOnlyReader(FileSystemReader):
    """Reads a checkpoint without trusting it: its pickled metadata may name only descriptions of tensors.

    Args:
        path: the checkpoint, on a file system or in a store.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("")
        self.fs, self.path, self.folder = _AnyStorage(), path, path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata.

        Raises:
            OSError: if it cannot be read.
            pickle.UnpicklingError: if it is malformed, or names anything but torch's own descriptions of tensors.
        """
        path = self.folder / internals.CHECKPOINT_METADATA
        check_regular(path)
        try:
            metadata: Metadata = _AllowList(io.BytesIO(path.read_bytes())).load()
            entries = list(metadata.state_dict_metadata.values())
            files = {place.relative_path for place in metadata.storage_data.values()}
        except OSError:
            raise
        except Exception as error:  # A malformed pickle raises exceptions of many types.
            raise pickle.UnpicklingError(f"the metadata of checkpoint {self.path} is malformed: {error!r}") from None
        if any(isinstance(entry, BytesStorageMetadata) for entry in entries):
            raise pickle.UnpicklingError(f"checkpoint {self.path} holds pickled objects, and only tensors are read")
        if foreign := [file for file in files if not (isinstance(file, str) and is_plain_name(file))]:
            raise pickle.UnpicklingError(
                f"the metadata of checkpoint {self.path} names the file {foreign[0]!r}, and only files of its own "
                "folder are read"
            )
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class PatientReader(TensorsOnlyReader):
    """Reads this rank's part of a checkpoint, and then tells the waiting ranks that it is read.

    Args:
        path: the checkpoint.
        patience: the means by which ranks wait for each other.
    """

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read the data of this rank's plan."""
        result = super().read_data(plan, planner)
        self._patience.arrive()
        return result


class _AnyStorage(FileSystem):
    """Opens files by the methods of their path, which may be in an object store."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file."""
        check_regular(path)
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        """Return the path of a file in the checkpoint."""
        return path / suffix


class _AllowList(internals.PythonUnpickler):  # type: ignore[misc]
    """Unpickles classes of torch's checkpoint metadata and a few plain types, and refuses every other name.

    It sets attributes of their instances only. A pickle that sets those of a class would change it for the process.
    """

    METADATA = "torch.distributed.checkpoint.metadata"
    NAMES = frozenset(
        {
            *internals.CHECKPOINT_METADATA_NAMES,
            ("torch", "Size"),
            ("torch", "device"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("builtins", "set"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the pickle stands for."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        metadata_class = getattr(checkpoint_metadata, name, None) if module == self.METADATA else None
        if is_dtype or getattr(metadata_class, "__module__", None) == self.METADATA or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata names {module}.{name}, which no checkpoint needs")

    def load_build(self) -> None:
        """Set the attributes of the object below the top of the stack to the state at the top."""
        target = self.stack[-2]
        # Of torch's descriptions, dataclasses have state, and enumerations have members that all of the process shares.
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise pickle.UnpicklingError(f"the checkpoint's metadata sets attributes of {target!r}, which has none")
        super().load_build()

    dispatch = internals.PythonUnpickler.dispatch | {pickle.BUILD[0]: load_build}
