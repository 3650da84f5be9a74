"""Reading a checkpoint of somebody else's without running code of theirs."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from longnet_dist import internals


class TensorsOnlyReader(FileSystemReader):
    """Reads a checkpoint without trusting it: its metadata is a pickle, and here it can name nothing but metadata."""

    def __init__(self, path: Path) -> None:
        super().__init__("")
        self.fs, self.path, self.folder = _AnyPlace(), path, path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            pickle.UnpicklingError: where it names anything but torch's own descriptions of tensors.
        """
        metadata: Metadata = _AllowList(io.BytesIO((self.folder / internals.CHECKPOINT_METADATA).read_bytes())).load()
        if any(isinstance(entry, BytesStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise pickle.UnpicklingError(f"checkpoint {self.path} holds pickled objects, and only tensors are read")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class _AnyPlace(FileSystem):
    """Files as the checkpoint's own path opens them, which may be of an object store."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """An open file."""
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        """A file of the checkpoint."""
        return path / suffix


class _AllowList(pickle.Unpickler):
    """Unpickles names of torch's checkpoint metadata and a few plain types, and refuses every other."""

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
        """What a name in the pickle stands for."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        own = getattr(checkpoint_metadata, name, None) if module == self.METADATA else None
        if dtype or getattr(own, "__module__", None) == self.METADATA or (module, name) in self.NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata names {module}.{name}, which no checkpoint needs")
