"""Writing tokens to disk, so that an interruption costs at most a minute of work and the batch in progress.

`index.json` is written last. Until then `partial.json` lists the complete shards, and says how much of the next one is
on disk and where the next document begins. An interrupted tokenisation resumes there, and ends with the same files as
one that was not interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longnet_dist.data.shards import (
    INDEX,
    PARTIAL,
    SHARD_TOKENS,
    Index,
    TokenShard,
    read_and_check_sizes,
    read_index,
    remedy,
)
from longnet_dist.data.tokenizers import Tokenizer
from longnet_dist.paths import write_whole

SAVE_SECONDS = 60.0
"""How often a shard in progress is saved, in seconds; only between batches."""
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 22, 1024
_READ_BYTES = 1 << 24


class DocumentReader(Protocol):
    """Documents in a fixed order."""

    @property
    def position(self) -> Any:
        """Where the next document begins, as JSON holds it."""

    def read(self, position: Any) -> Iterator[bytes]:
        """Yield the documents from a position on; from the first if it is None."""


def write_tokens(
    documents: DocumentReader,
    tokenizer: Tokenizer,
    folder: Path,
    source: str,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """Tokenise documents into a folder; resume if it holds some of them, and return at once if it holds all.

    Args:
        documents: the documents.
        tokenizer: the tokenizer.
        folder: the folder to write; created if it is missing. If another process writes it, wait until that one ends.
        source: identifies the documents, their order and the tokenizer. A folder of another source is not changed.
        shard_tokens: number of tokens after which a shard ends; the batch of documents that reaches it is its last.
        progress: called with the number of bytes of text tokenised so far.

    Returns:
        The folder's index.

    Raises:
        ValueError: if the folder holds tokens of another source, there is no text, or a document cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_folder(folder):
        if (folder / INDEX).exists():
            index = read_index(folder)
            _check_source(folder, index, source)
            return index
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        new = Index(source, tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document, dtype)
        with _Writer(folder, new, tokenizer) as writer:
            for batch in _batches(documents.read(writer.position)):
                writer.add(batch, documents.position)
                progress(writer.num_bytes)
                if writer.shard.tokens >= shard_tokens:
                    writer.end_shard()
                elif time.monotonic() - writer.saved_at > SAVE_SECONDS:
                    writer.save()
            if writer.shard.documents:
                writer.end_shard()
        index = writer.index
        if sum(shard.num_bytes for shard in index.shards) == 0:
            raise ValueError("the data has no text: every document is empty")
        write_whole(folder / INDEX, json.dumps(asdict(index), indent=1) + "\n")
        (folder / PARTIAL).unlink()
    return index


class _Writer:
    """Appends tokens to the next shard of a folder, from where an earlier writer was interrupted.

    As a context, it saves what it has when it is left, by an error too.
    """

    def __init__(self, folder: Path, new: Index, tokenizer: Tokenizer) -> None:
        self.folder, self.index, self.tokenizer = folder, new, tokenizer
        self.position: Any = None
        """Where the document after the last one that was added begins."""
        self._shard_position: Any = None
        """Where the first document of the shard begins."""
        self.shard = self._new_shard()
        """What was added to the shard, but for its hash."""
        self._hash = hashlib.sha256()
        saved = self._read_partial(new)
        kept = self._path if saved is not None and self._resume(saved) else None
        for leftover in folder.glob("unfinished-*"):
            if leftover != kept:
                leftover.unlink()
        self._file = self._path.open("r+b" if kept else "w+b")
        self._file.seek(0, os.SEEK_END)
        self.save()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None and not self._file.closed:
                self.save()
        if not self.shard.documents:
            self._path.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of text in all documents that were added."""
        return self.shard.num_bytes + sum(shard.num_bytes for shard in self.index.shards)

    def add(self, batch: list[bytes], position: Any) -> None:
        """Tokenise documents, and append them to the shard; `position` is where the next one begins."""
        ends = np.array([self.tokenizer.end_of_document])
        tokens = [part.astype(self.index.dtype) for ids in self.tokenizer.encode(batch) for part in (ids, ends)]
        content = np.concatenate(tokens).tobytes()
        self._file.write(content)
        shard = replace(
            self.shard,
            tokens=self.shard.tokens + len(content) // self._item_bytes,
            documents=self.shard.documents + len(batch),
            num_bytes=self.shard.num_bytes + sum(map(len, batch)),
        )
        # An interruption between these lines is found by the hash, and then costs the shard.
        self._hash.update(content)
        self.shard, self.position = shard, position

    def save(self) -> None:
        """Write to disk what was added since the last complete shard."""
        self._flush()
        shard = asdict(replace(self.shard, sha256=self._hash.hexdigest()))
        resume = {"shard": shard, "position": self.position, "shard_position": self._shard_position}
        write_whole(self.folder / PARTIAL, json.dumps(asdict(self.index) | {"resume": resume}, indent=1))
        self.saved_at = time.monotonic()

    def end_shard(self) -> None:
        """Complete the shard, and begin the next one."""
        self._flush()
        self._file.close()
        os.chmod(self._path, 0o644)
        os.replace(self._path, self.folder / self.shard.name)
        complete = replace(self.shard, sha256=self._hash.hexdigest())
        self.index = replace(self.index, shards=(*self.index.shards, complete))
        self.shard, self._hash, self._shard_position = self._new_shard(), hashlib.sha256(), self.position
        self._file = self._path.open("w+b")
        self.save()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read_partial(self, new: Index) -> dict[str, Any] | None:
        """Read what an earlier writer of the same source saved, and its index; None if there is nothing to resume."""
        path = self.folder / PARTIAL
        if not path.exists():
            return None
        partial = read_and_check_sizes(path)
        saved = json.loads(path.read_text()).get("resume")
        if partial.shards:
            _check_source(self.folder, partial, new.source)
        if partial.source != new.source or saved is None:
            return None
        if not isinstance(saved, dict) or not {"shard", "position", "shard_position"} <= saved.keys():
            raise ValueError(f"{path} cannot be read; {remedy(self.folder)}")
        self.index, self._shard_position = partial, saved["shard_position"]
        self.position, self.shard = self._shard_position, self._new_shard()
        return saved

    def _resume(self, saved: dict[str, Any]) -> bool:
        """Take over an unfinished shard if its file holds what was saved; return whether it does."""
        try:
            shard = TokenShard(**saved["shard"])
        except TypeError:
            return False
        size = shard.tokens * self._item_bytes
        if shard.name != self.shard.name or not self._path.is_file() or self._path.stat().st_size < size:
            return False
        with self._path.open("r+b") as file:
            file.truncate(size)
            content = hashlib.sha256()
            while part := file.read(_READ_BYTES):
                content.update(part)
        if content.hexdigest() != shard.sha256:
            return False
        self.shard, self._hash, self.position = shard, content, saved["position"]
        return True

    def _new_shard(self) -> TokenShard:
        return TokenShard(f"tokens-{len(self.index.shards):05d}.bin", 0, 0, 0, "")

    @property
    def _path(self) -> Path:
        return self.folder / f"unfinished-{self.shard.name}"

    @property
    def _item_bytes(self) -> int:
        return np.dtype(self.index.dtype).itemsize


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Group documents into batches that are large enough to keep a tokenizer's threads busy."""
    batch: list[bytes] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document)
        if len(batch) >= _BATCH_DOCUMENTS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_source(folder: Path, index: Index, source: str) -> None:
    if index.source != source:
        raise ValueError(
            f"{folder} holds tokens of other data, another order or another tokenizer ({index.tokenizer}); use "
            "another folder, or remove this one"
        )


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock for writing into `folder`; the system releases it if the process ends."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
