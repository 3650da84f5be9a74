"""Tokens on disk: a folder of memory-mapped shards and an index, written so that it can be gone on with.

`index.json` is there only when all is. Until then `partial.json` says which shards are whole and how many documents
they hold, so that a tokenisation that was stopped begins again behind them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.tokenizers import Tokenizer

INDEX, PARTIAL = "index.json", "partial.json"
SHARD_TOKENS = 1 << 27
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 22, 1024
_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class Shard:
    """A file of tokens; documents do not cross its ends."""

    name: str
    tokens: int
    documents: int
    num_bytes: int
    """Of its documents' text."""
    sha256: str
    """Of the file, as it was written."""


@dataclass(frozen=True)
class Index:
    """What a folder of tokens holds."""

    source: str
    """What was tokenised, and how, as a hash of it."""
    tokenizer: str
    vocab_size: int
    end_of_document: int
    dtype: str
    """Of the shards: uint16, or uint32 for vocabularies beyond it."""
    shards: tuple[Shard, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens, ends of documents included, a byte of text."""
        return self.num_tokens / max(1, sum(shard.num_bytes for shard in self.shards))


def holds_tokens(folder: Path) -> bool:
    """Whether `write_tokens` wrote in this folder; an `index.json` of something else does not make it one."""
    indexes = [folder / name for name in (INDEX, PARTIAL) if (folder / name).is_file()]
    return bool(indexes) and (
        any(is_shard(path) for path in folder.glob("tokens-*.bin"))
        or any(b'"shards"' in path.read_bytes() for path in indexes)
    )


def is_shard(path: Path) -> bool:
    """Whether a file has the name of a shard."""
    return re.fullmatch(r"tokens-\d{5,}\.bin", path.name) is not None


def read_index(folder: Path) -> Index:
    """The index of a folder of tokens.

    Raises:
        ValueError: where there is none, it cannot be read, or a shard has not the size it tells of.
    """
    path = folder / INDEX
    if not path.exists():
        half = (folder / PARTIAL).exists()
        raise ValueError(
            f"{folder} holds a tokenisation that was stopped: start the same `longnet-dist tokenize` again"
            if half
            else f"{folder} holds no {INDEX}; give a folder that `longnet-dist tokenize` wrote"
        )
    return _with_whole_shards(path)


def check_tokens(folder: Path, index: Index) -> None:
    """Read all tokens once, to see that each is below the vocabulary's size, and that they are as they were written.

    Raises:
        ValueError: naming the file, and the byte of the first that is not below it.
    """
    for shard in index.shards:
        digest = hashlib.sha256()
        tokens = np.memmap(folder / shard.name, index.dtype, "r")
        for first in range(0, len(tokens), _AT_A_TIME):
            part = tokens[first : first + _AT_A_TIME]
            digest.update(part.tobytes())
            if part.max(initial=0) >= index.vocab_size:
                at = first + int(np.argmax(part >= index.vocab_size))
                raise ValueError(
                    f"{folder / shard.name}, byte {at * tokens.itemsize}: token id {tokens[at]}, and the vocabulary "
                    f"of {index.tokenizer} has {index.vocab_size}; {_again(folder)}"
                )
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"{folder / shard.name} is not as it was written; {_again(folder)}")


def write_tokens(
    documents: Callable[[], Iterator[bytes]],
    tokenizer: Tokenizer,
    folder: Path,
    source: str,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> Index:
    """Tokenise `documents` into `folder`; goes on with what is there of them, and does nothing where all is.

    Args:
        documents: called once, the documents in an order that never changes.
        tokenizer: makes ids of them.
        folder: made where it is not there. Another process that writes the same is waited for.
        source: names the documents, their order and the tokenizer; a folder of another is not touched.
        shard_tokens: after how many tokens a shard ends, with the batch of documents that reaches them.
        progress: called with the bytes of documents done so far.

    Raises:
        ValueError: where the folder holds tokens of another source, there is no text, or a document is not as it
            should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / INDEX).exists():
            index = read_index(folder)
            _check_source(folder, index, source)
            return index
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        index = Index(source, tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document, dtype)
        for left in folder.glob("unfinished-*"):
            left.unlink()
        if (folder / PARTIAL).exists() and (partial := _with_whole_shards(folder / PARTIAL)).shards:
            index = partial
            _check_source(folder, index, source)
        else:  # Before the first shard, too: the folder is one of tokens, and no text.
            write_whole(folder / PARTIAL, json.dumps(asdict(index), indent=1))
        todo = islice(documents(), sum(shard.documents for shard in index.shards), None)
        batches = _batches(todo)
        while (shard := _write_shard(batches, tokenizer, folder, index, shard_tokens, progress)) is not None:
            index = Index(**{**vars(index), "shards": (*index.shards, shard)})
            write_whole(folder / PARTIAL, json.dumps(asdict(index), indent=1))
        if sum(shard.num_bytes for shard in index.shards) == 0:
            raise ValueError("the data holds no text: every document is empty")
        write_whole(folder / INDEX, json.dumps(asdict(index), indent=1) + "\n")
        (folder / PARTIAL).unlink()
    return index


@dataclass(frozen=True)
class TokenStream:
    """The tokens [start, stop) of a folder of tokens."""

    folder: Path
    index: Index
    start: int
    stop: int

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` tokens it holds, each with the token after it."""
        return max(0, (self.stop - self.start - 1) // seq_len)

    def read(self, window: int, seq_len: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels of the rows [first, last) of a window, int64 each; no other part is read.

        The label of a row is the token after it, so they are shifted before they are split.
        """
        begin = self.start + window * seq_len
        both = torch.from_numpy(self._between(begin + first, begin + last + (last > first)).astype(np.int64))
        return both[: last - first], both[1:]

    def tokens(self, limit: int) -> np.ndarray:
        """Up to `limit` tokens from its beginning, as they are on disk."""
        return self._between(self.start, min(self.stop, self.start + limit))

    def _between(self, first: int, last: int) -> np.ndarray:
        parts, begin = [], 0
        for shard in self.index.shards:
            a, b = max(first, begin), min(last, begin + shard.tokens)
            if a < b:
                parts.append(_mapped(self.folder / shard.name, self.index.dtype)[a - begin : b - begin])
            begin += shard.tokens
        return np.concatenate(parts) if parts else np.empty(0, self.index.dtype)


@lru_cache(maxsize=64)
def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r")


def _write_shard(
    batches: Iterator[list[bytes]],
    tokenizer: Tokenizer,
    folder: Path,
    index: Index,
    shard_tokens: int,
    progress: Callable[[int], None],
) -> Shard | None:
    """The next shard, written under another name and renamed; None where no document is left."""
    documents, num_bytes, before = 0, 0, sum(shard.num_bytes for shard in index.shards)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="unfinished-", delete=False) as out:
        try:
            for batch in batches:
                ends = np.array([tokenizer.end_of_document])
                tokens = [part.astype(index.dtype) for ids in tokenizer.encode(batch) for part in (ids, ends)]
                written = np.concatenate(tokens).tobytes()
                out.write(written)
                digest.update(written)
                documents, num_bytes = documents + len(batch), num_bytes + sum(map(len, batch))
                progress(before + num_bytes)
                if out.tell() >= shard_tokens * np.dtype(index.dtype).itemsize:
                    break
            out.flush()
            os.fsync(out.fileno())
            if documents:
                name = f"tokens-{len(index.shards):05d}.bin"
                os.chmod(out.name, 0o644)
                os.replace(out.name, folder / name)
                num_tokens = out.tell() // np.dtype(index.dtype).itemsize
                return Shard(name, num_tokens, documents, num_bytes, digest.hexdigest())
            os.unlink(out.name)
        except BaseException:
            os.unlink(out.name)
            raise
    return None


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Enough at a time to keep a tokenizer's threads busy."""
    batch: list[bytes] = []
    weight = 0
    for document in documents:
        batch.append(document)
        weight += len(document)
        if len(batch) >= _BATCH_DOCUMENTS or weight >= _BATCH_BYTES:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def _check_source(folder: Path, index: Index, source: str) -> None:
    if index.source != source:
        raise ValueError(
            f"{folder} holds tokens of other data, another order or another tokenizer ({index.tokenizer}); give "
            "another folder, or remove it"
        )


def _with_whole_shards(path: Path) -> Index:
    """The index in a file, where the shards beside it have the sizes that it tells of."""
    folder = path.parent
    try:
        given = json.loads(path.read_text())
        index = Index(**{**given, "shards": tuple(Shard(**shard) for shard in given["shards"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); {_again(folder)}") from None
    for shard in index.shards:
        file = folder / shard.name
        have, want = file.stat().st_size if file.exists() else None, shard.tokens * np.dtype(index.dtype).itemsize
        if have != want:
            said = "is missing" if have is None else f"ends at byte {have}"
            raise ValueError(f"{file} {said}, and {path} tells of {want} bytes; {_again(folder)}")
    return index


def _again(folder: Path) -> str:
    return f"remove {folder}, and tokenise the data again"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that write into `folder`; the lock of one that ends is gone with it."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or not at all."""
    out = tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False)  # noqa: SIM115
    try:
        with out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(out.name, 0o644)
        os.replace(out.name, path)
    except BaseException:
        os.unlink(out.name)
        raise
