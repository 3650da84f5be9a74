"""Where a run is kept: a file system that every rank sees, or an object store such as S3, which cannot rename.

    place("runs/first")                       a Path
    place("s3://bucket/runs/first")           a UPath of universal_pathlib: the same methods, over fsspec

On a file system a checkpoint is written under another name, flushed and renamed. In a store each object
appears whole or not at all, and none can be renamed: there the manifest is written last, and what has none
is no checkpoint. Nothing of a checkpoint that has its manifest is ever overwritten, in either.
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
_FIGURES = ("config.json", "metrics.jsonl", "events.out.tfevents.*", "traces/*")
"""What a run writes beside its checkpoints, and can be gone on with from."""
_WITHOUT_BUCKET = ("memory", "hdfs", "local")


def place(given: str | Path) -> Path:
    """The path that this names; where it has a scheme (s3://, gs://, ...) one of that store, with a Path's methods.

    Raises:
        ValueError: if it names no place, there is no such store, or the store's package is not installed.
    """
    if not isinstance(given, str | Path):
        return given
    scheme, found, rest = str(given).partition("://")
    if not found or scheme == "file":
        return local_path(given)
    if scheme and not (rest.strip("/") if scheme in _WITHOUT_BUCKET else rest.partition("/")[0]):
        raise ValueError(f"{given} names no bucket; {scheme}://BUCKET/PREFIX does")
    with extra("s3", given):
        from upath import UPath
        from upath.registry import get_upath_class
    if not scheme or get_upath_class(scheme) is None:
        raise ValueError(f"{given}: no store is known by {scheme}://; s3://BUCKET/PREFIX is one")
    # Other ranks write there too, so what was listed once is not true for long.
    made: Any = UPath(str(given).rstrip("/"), use_listings_cache=False)
    try:
        made.fs  # noqa: B018 (The client, whose package may be missing.)
    except ImportError as error:
        raise ValueError(f"{given}: {error}") from None
    return made


def in_store(path: Path) -> bool:
    """Whether it is of an object store, in place of a file system."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """What a store's client raises, of kinds of its own, as the OSError that the failure of a disk is."""
    try:
        yield
    except (OSError, ValueError, AssertionError):
        raise
    except Exception as error:  # botocore's, google's, ...: there is none that all have in common.
        raise OSError(f"{type(error).__name__}: {error}") from error


def problem_with(folder: Path) -> str | None:
    """Why nothing can be kept in this place of a store; None where it can."""
    try:
        with as_os_error():
            (folder / ".longnet_dist").write_text("A run of longnet_dist is kept here.\n")
    except OSError as error:
        return f"{folder} cannot be written: {error}; the bucket must be there, and the credentials be allowed to write"
    return None


class Disk:
    """Checkpoints in a folder that every rank sees: written as `NAME.tmp-NONCE`, flushed, and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names of those that were renamed, oldest first; a user's `step-00000100.backup` is none of them.

        Raises:
            OSError: where the folder cannot be listed; one that is not there yet has none.
        """
        try:
            return _steps(os.listdir(self.folder))  # A glob would pass over every error.
        except FileNotFoundError:
            if self.folder.is_symlink():  # To what is not mounted, for example.
                raise
            return []

    def begin(self, name: str, nonce: str) -> Path:
        """A folder for what a rank writes of `name`. Every rank calls it, with one nonce."""
        temporary = self.folder / f"{name}.tmp-{nonce}"
        temporary.mkdir(parents=True, exist_ok=True)
        return temporary

    def put(self, name: str, temporary: Path, files: Iterable[str]) -> None:
        """Keep this rank's files: they are where they must be."""

    def finish(self, name: str, temporary: Path, manifest: str) -> None:
        """On rank 0, when all ranks' files are kept: from now on it is a checkpoint."""
        with (temporary / MANIFEST).open("w") as out:
            out.write(manifest)
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(temporary)
        final = self.folder / name
        if final.exists():  # Of a run that went on from an older one, because this was damaged.
            os.rename(final, self.folder / f"{name}.tmp-replaced-{uuid.uuid4().hex[:8]}")
        os.rename(temporary, final)
        _sync_folder(self.folder)

    def abandon(self, temporary: Path) -> None:
        """Remove what `begin` made of one that failed."""
        shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints, and what is left of those that were not finished."""
        for name in names:  # Renamed first: half a checkpoint must not look like one.
            with contextlib.suppress(OSError):
                os.rename(self.folder / name, self.folder / f"{name}.tmp-old-{uuid.uuid4().hex[:8]}")
        for path in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)


class Store:
    """Checkpoints in an object store: each rank's files are written here and put there, and the manifest last.

    Args:
        folder: of the store.

    TMPDIR must have room for what a rank holds of a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names of those that have a manifest, oldest first.

        Raises:
            OSError: where the folder cannot be listed; one that is not there yet has none.
        """
        return [name for name in _steps(self._listed(self.folder)) if MANIFEST in self._listed(self.folder / name)]

    def _listed(self, folder: Path) -> list[str]:
        """The names in a folder of the store; a glob may pass over errors."""
        try:
            with as_os_error():
                found = folder.fs.ls(folder.path, detail=False)  # type: ignore[attr-defined]
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def begin(self, name: str, nonce: str) -> Path:
        """A folder on this machine. A damaged checkpoint of that name is none from here on."""
        with as_os_error():
            (self.folder / name / MANIFEST).unlink(missing_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-{nonce}-"))

    def put(self, name: str, temporary: Path, files: Iterable[str]) -> None:
        """Put this rank's files into the store."""
        for file in files:
            copy(temporary / file, self.folder / name / file)

    def finish(self, name: str, temporary: Path, manifest: str) -> None:
        """On rank 0, when all ranks' files are there: from now on it is a checkpoint."""
        with as_os_error():
            (self.folder / name / MANIFEST).write_text(manifest)

    def abandon(self, temporary: Path) -> None:
        """Remove this machine's copy, which is not needed either way."""
        shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints, and what is left of those that were not finished."""
        with contextlib.suppress(OSError), as_os_error():
            for name in names:  # First: half a checkpoint must not look like one.
                (self.folder / name / MANIFEST).unlink()
            whole = self.names()
            for path in list(self.folder.glob("step-*")):
                if path.name not in whole and _steps([path.name]):
                    path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]


class Figures:
    """What a run writes beside its checkpoints: in its folder, or, of a store, in `work`, and copied.

    Files that grow cannot be in a store. While inside, they are those that the store held of an earlier start, perhaps
    of another machine; at every checkpoint and at the end, however it comes, they are copied there.

    Args:
        folder: the run's, of a file system or a store.
        work: a folder of this machine, which is used for a store's.
        copies: whether this process copies; one of the run does.
    """

    def __init__(self, folder: Path, work: Path, copies: bool) -> None:
        self.kept = folder if in_store(folder) and copies else None
        self.folder = work if in_store(folder) else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put: dict[Path, tuple[int, int]] = {}
        self._effort = BestEffort(f"the figures in {folder}")

    def __enter__(self) -> None:
        if self.kept is None:
            return
        for pattern in _FIGURES:
            for path in self._here(pattern):
                path.unlink()
            with as_os_error():
                for path in self.kept.glob(pattern):
                    copy(path, self.folder / Path(pattern).with_name(path.name))

    def __exit__(self, *_: object) -> None:
        self.keep()

    def keep(self) -> None:
        """Copy what has changed. A store that fails is a warning: the run goes on."""
        if self.kept is None:
            return
        with self._effort:
            for path in [path for pattern in _FIGURES for path in self._here(pattern)]:
                state = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._put.get(path) != state:
                    copy(path, self.kept / str(path.relative_to(self.folder)))
                    self._put[path] = state

    def _here(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob(pattern) if path.is_file()]


def copy(source: Path, target: Path) -> None:
    """Copy a file, from or to a store too; it appears there whole or not at all."""
    if not in_store(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with as_os_error(), source.open("rb") as data, target.open("wb") as out:
        shutil.copyfileobj(data, out, 1 << 24)


def _steps(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"step-\d{8,}", name))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
