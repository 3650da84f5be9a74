"""The storage of a run: a file system that every rank sees, or an object store such as S3, which cannot rename.

    storage_path("runs/first")                returns a Path
    storage_path("s3://bucket/runs/first")    returns a UPath of universal_pathlib: the same methods, over fsspec

On a file system, a checkpoint is written under another name, flushed and renamed. In a store, each object
appears whole or not at all, and none can be renamed. There the manifest is written last, and a folder without
one is no checkpoint. In either, no file of a checkpoint that has its manifest is ever overwritten.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from longnet_dist.best_effort import BestEffort
from longnet_dist.extras import extra
from longnet_dist.paths import local_path

MANIFEST = "manifest.json"
_RUN_FILES = ("config.json", "metrics.jsonl", "events.out.tfevents.*", "traces/*")
"""Patterns of the files that a run writes next to its checkpoints, and continues when it resumes."""
_SCHEMES_WITHOUT_BUCKET = ("memory", "hdfs", "local")


def storage_path(text: str | Path) -> Path:
    """Return the path that a text names, on a file system or in an object store.

    Args:
        text: a path; with a scheme (s3://, gs://, ...), one in a store.

    Returns:
        A `Path`, or for a store an object with a Path's methods.

    Raises:
        ValueError: if `text` is empty or names no bucket, the store is unknown, or its package is not installed.

    Example:
        >>> storage_path("runs/first")
        PosixPath('runs/first')
    """
    if not isinstance(text, str | Path):
        return text
    scheme, separator, rest = str(text).partition("://")
    if not separator or scheme == "file":
        return local_path(text)
    if scheme and not (rest.strip("/") if scheme in _SCHEMES_WITHOUT_BUCKET else rest.partition("/")[0]):
        raise ValueError(f"{text} names no bucket; {scheme}://BUCKET/PREFIX does")
    with extra("s3", text):
        from upath import UPath
        from upath.registry import get_upath_class
    if not scheme or get_upath_class(scheme) is None:
        raise ValueError(f"{text}: no store is known by {scheme}://; s3://BUCKET/PREFIX is one")
    # Other ranks write to the store too, so a cached listing would soon be out of date.
    path: Any = UPath(str(text).rstrip("/"), use_listings_cache=False)
    try:
        path.fs  # noqa: B018 (Creates the client, whose package may be missing.)
    except ImportError as error:
        raise ValueError(f"{text}: {error}") from None
    return path


def in_store(path: Path) -> bool:
    """Return whether a path is in an object store, not on a file system."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Convert the exceptions of a store's client to OSError, which a failing disk raises, too."""
    try:
        yield
    except (OSError, ValueError, AssertionError):
        raise
    except Exception as error:  # Those of botocore, google, ... have no base class in common.
        raise OSError(f"{type(error).__name__}: {error}") from error


def write_problem(folder: Path) -> str | None:
    """Return why nothing can be written to a folder of a store, or None."""
    try:
        with as_os_error():
            (folder / ".longnet_dist").write_text("A run of longnet_dist is kept here.\n")
    except OSError as error:
        return f"{folder} cannot be written: {error}; the bucket must exist, and the credentials must allow writing"
    return None


class Disk:
    """Checkpoints in a folder that every rank sees: written as `NAME.tmp-NONCE`, flushed, and renamed.

    Args:
        folder: the folder of a run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all complete checkpoints, oldest first. Copies under other names do not count.

        Raises:
            OSError: if the folder cannot be listed. A folder that does not exist yet has no checkpoints.
        """
        try:
            return _checkpoint_names(os.listdir(self.folder))  # A glob would ignore every error.
        except FileNotFoundError:
            if self.folder.is_symlink():  # Its target may not be mounted.
                raise
            return []

    def begin(self, name: str, nonce: str) -> Path:
        """Return a folder for this rank's files of a checkpoint. Every rank calls it, with the same nonce."""
        temporary = self.folder / f"{name}.tmp-{nonce}"
        temporary.mkdir(parents=True, exist_ok=True)
        return temporary

    def put(self, name: str, temporary: Path, files: Iterable[str]) -> None:
        """Store this rank's files. On a disk they are in place already."""

    def finish(self, name: str, temporary: Path, manifest: str) -> None:
        """Complete a checkpoint, on rank 0, after all ranks have stored their files."""
        with (temporary / MANIFEST).open("w") as out:
            out.write(manifest)
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(temporary)
        final = self.folder / name
        if final.exists():  # It was damaged, so the run resumed from an older one.
            os.rename(final, self.folder / f"{name}.tmp-replaced-{uuid.uuid4().hex[:8]}")
        os.rename(temporary, final)
        _sync_folder(self.folder)

    def abandon(self, temporary: Path) -> None:
        """Remove the folder that `begin` returned, after a failure."""
        shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints, and the remains of unfinished ones."""
        for name in names:  # Renamed first, so that half a checkpoint does not look like a checkpoint.
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, self.folder / f"{name}.tmp-old-{uuid.uuid4().hex[:8]}")
        for path in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)


class Store:
    """Checkpoints in an object store: ranks write their files on their machines and upload them; the manifest is last.

    TMPDIR must have room for a rank's part of a checkpoint.

    Args:
        folder: the folder of a run's checkpoints, in the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all checkpoints that have a manifest, oldest first.

        Raises:
            OSError: if the folder cannot be listed. A folder that does not exist yet has no checkpoints.
        """
        names = _checkpoint_names(self._list(self.folder))
        return [name for name in names if MANIFEST in self._list(self.folder / name)]

    def _list(self, folder: Path) -> list[str]:
        """Return the names in a folder of the store. A glob might ignore errors."""
        try:
            with as_os_error():
                paths = folder.fs.ls(folder.path, detail=False)  # type: ignore[attr-defined]
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def begin(self, name: str, nonce: str) -> Path:
        """Return a folder on this machine; an older, damaged checkpoint of this name loses its manifest."""
        with as_os_error():
            (self.folder / name / MANIFEST).unlink(missing_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-{nonce}-"))

    def put(self, name: str, temporary: Path, files: Iterable[str]) -> None:
        """Upload this rank's files."""
        for file in files:
            copy(temporary / file, self.folder / name / file)

    def finish(self, name: str, temporary: Path, manifest: str) -> None:
        """Complete a checkpoint, on rank 0, after all ranks have uploaded their files."""
        with as_os_error():
            (self.folder / name / MANIFEST).write_text(manifest)

    def abandon(self, temporary: Path) -> None:
        """Remove the folder that `begin` returned, after a failure or an upload."""
        shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints, and the remains of unfinished ones."""
        with contextlib.suppress(OSError), as_os_error():
            for name in names:  # Manifests first, so that half a checkpoint does not look like a checkpoint.
                (self.folder / name / MANIFEST).unlink()
            complete = self.names()
            for path in list(self.folder.glob("step-*")):
                if path.name not in complete and _checkpoint_names([path.name]):
                    path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]


class RunFiles:
    """The files of a run other than its checkpoints; if the run is in a store, local copies that are uploaded.

    An object in a store cannot be appended to, so such a run writes its files into `work`. On entry, the files of an
    earlier start, perhaps on another machine, are downloaded. They are uploaded at every checkpoint, and on exit.

    Args:
        folder: the run folder, on a file system or in a store.
        work: a folder on this machine, used if the run folder is in a store.
        upload: whether this process uploads the files. One process of a run does.
    """

    def __init__(self, folder: Path, work: Path, upload: bool) -> None:
        self.remote = folder if in_store(folder) and upload else None
        self.folder = work if in_store(folder) else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._effort = BestEffort(f"the files in {folder}")

    def __enter__(self) -> None:
        if self.remote is None:
            return
        for pattern in _RUN_FILES:
            for path in self._local_files(pattern):
                path.unlink()
            with as_os_error():
                for path in self.remote.glob(pattern):
                    copy(path, self.folder / Path(pattern).with_name(path.name))

    def __exit__(self, *_: object) -> None:
        self.upload()

    def upload(self) -> None:
        """Upload the files that have changed. If the store fails, warn, and let the run continue."""
        if self.remote is None:
            return
        with self._effort:
            for path in [path for pattern in _RUN_FILES for path in self._local_files(pattern)]:
                version = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._uploaded.get(path) != version:
                    copy(path, self.remote / str(path.relative_to(self.folder)))
                    self._uploaded[path] = version

    def _local_files(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob(pattern) if path.is_file()]


def copy(source: Path, target: Path) -> None:
    """Copy a file; in a store, the copy appears whole or not at all."""
    if not in_store(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with as_os_error(), source.open("rb") as data, target.open("wb") as out:
        shutil.copyfileobj(data, out, 1 << 24)


def _checkpoint_names(names: Iterable[str]) -> list[str]:
    """Return the names that have the form of a checkpoint's, sorted."""
    return sorted(name for name in names if re.fullmatch(r"step-\d{8,}", name))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
