"""Tokens on disk: a folder of memory-mapped shards and an index, and how they are read. `writing` writes them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INDEX, PARTIAL = "index.json", "partial.json"
SHARD_TOKENS = 1 << 27
"""Default number of tokens per shard."""
_SHARD_NAME = re.compile(r"tokens-\d{5,}\.bin")
_CHECKED_TOKENS = 1 << 24
"""How many tokens `check_tokens` reads at a time."""


@dataclass(frozen=True)
class TokenShard:
    """A file of whole documents, as tokens."""

    name: str
    """Name of the file in the folder."""
    tokens: int
    """Number of tokens."""
    documents: int
    """Number of documents."""
    num_bytes: int
    """Number of bytes of text in the documents."""
    sha256: str
    """SHA-256 of the file as it was written."""


@dataclass(frozen=True)
class Index:
    """The content of a folder of tokens."""

    source: str
    """Hash that identifies the documents, their order and the tokenizer."""
    tokenizer: str
    """Name of the tokenizer."""
    vocab_size: int
    """Number of token ids, including the end-of-document id."""
    end_of_document: int
    """The id that follows each document."""
    dtype: str
    """NumPy dtype of the shards: uint16, or uint32 if the vocabulary needs it."""
    shards: tuple[TokenShard, ...] = ()
    """The shards, in order."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def tokens_per_byte(self) -> float:
        """Number of tokens, including end-of-document ids, per byte of text."""
        return self.num_tokens / max(1, sum(shard.num_bytes for shard in self.shards))


def holds_tokens(folder: Path) -> bool:
    """Return whether `write_tokens` wrote into this folder; an `index.json` of another program does not count."""
    indexes = [folder / name for name in (INDEX, PARTIAL) if (folder / name).is_file()]
    return bool(indexes) and (
        any(is_shard(path) for path in folder.glob("tokens-*.bin"))
        or any(b'"shards"' in path.read_bytes() for path in indexes)
    )


def is_shard(path: Path) -> bool:
    """Return whether a file has the name of a shard."""
    return _SHARD_NAME.fullmatch(path.name) is not None


def read_index(folder: Path) -> Index:
    """Read the index of a folder of tokens.

    Raises:
        ValueError: if the index is missing or malformed, or a shard is missing or has another size.
    """
    path = folder / INDEX
    if not path.is_file():
        unfinished = (folder / PARTIAL).exists()
        raise ValueError(
            f"{folder} holds an unfinished tokenisation: run the same `longnet-dist tokenize` again"
            if unfinished
            else f"{folder} has no {INDEX}; give a folder that `longnet-dist tokenize` wrote"
        )
    return read_and_check_sizes(path)


def check_tokens(folder: Path, index: Index) -> None:
    """Check that all tokens are below the vocabulary size, and that each shard has the hash in the index.

    Args:
        folder: the folder of tokens.
        index: its index.

    Raises:
        ValueError: if a check fails; the message names the file, and the byte of the first token that is too large.
    """
    for shard in index.shards:
        digest = hashlib.sha256()
        tokens = np.memmap(folder / shard.name, index.dtype, "r")
        for first in range(0, len(tokens), _CHECKED_TOKENS):
            part = tokens[first : first + _CHECKED_TOKENS]
            digest.update(part.tobytes())
            if part.max(initial=0) >= index.vocab_size:
                at = first + int(np.argmax(part >= index.vocab_size))
                raise ValueError(
                    f"{folder / shard.name}, byte {at * tokens.itemsize}: token id {tokens[at]}, and the vocabulary "
                    f"of {index.tokenizer} has {index.vocab_size} ids; {remedy(folder)}"
                )
        if digest.hexdigest() != shard.sha256:
            raise ValueError(f"{folder / shard.name} has changed since it was written; {remedy(folder)}")


@dataclass(frozen=True)
class TokenStream:
    """The tokens [start, stop) of a folder, read in windows of equal length."""

    folder: Path
    index: Index
    start: int
    stop: int

    def num_windows(self, seq_len: int) -> int:
        """Return the number of windows of `seq_len` tokens; each needs one more token, the label of its last row."""
        return max(0, (self.stop - self.start - 1) // seq_len)

    def read(self, window: int, seq_len: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Read the tokens and labels of the rows [first, last) of a window, and nothing else.

        The label of a row is the token after it: labels are shifted before they are split over ranks.

        Args:
            window: number of the window, from 0.
            seq_len: length of a window in tokens.
            first, last: the rows of the window to read.

        Returns:
            Tokens and labels, each (last - first,), int64.
        """
        begin = self.start + window * seq_len
        ids = torch.from_numpy(self._read_range(begin + first, begin + last + (last > first)).astype(np.int64))
        return ids[: last - first], ids[1:]

    def documents(self, window: int, seq_len: int) -> Tensor:
        """Return the offsets of the documents in a window, as `cu_seqlens` of `dilated_attention`: int64.

        It ends twice with `seq_len` if the window ends with a document, whose last token then predicts nothing.
        """
        begin = self.start + window * seq_len
        ends = np.flatnonzero(self._read_range(begin, begin + seq_len) == self.index.end_of_document) + 1
        return torch.from_numpy(np.concatenate(([0], ends, [seq_len])).astype(np.int64))

    def tokens(self, limit: int) -> np.ndarray:
        """Read the first tokens of the stream, at most `limit`, in the dtype on disk."""
        return self._read_range(self.start, min(self.stop, self.start + limit))

    def _read_range(self, first: int, last: int) -> np.ndarray:
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


def read_and_check_sizes(path: Path) -> Index:
    """Read an index file, and check that the shards next to it have the sizes that it records."""
    folder = path.parent
    try:
        content = json.loads(path.read_text())
        content.pop("resume", None)
        if not isinstance(content["shards"], list):
            raise TypeError("its shards must be a list")
        index = Index(**{**content, "shards": tuple(TokenShard(**shard) for shard in content["shards"])})
        _check_fields(index)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); {remedy(folder)}") from None
    for shard in index.shards:
        file = folder / shard.name
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
            raise ValueError(f"{file} is no regular file, and symbolic links are not followed; put a copy in its place")
        size = file.stat().st_size if file.exists() else None
        expected = shard.tokens * np.dtype(index.dtype).itemsize
        if size != expected:
            problem = "is missing" if size is None else f"ends at byte {size}"
            raise ValueError(f"{file} {problem}, and {path} records {expected} bytes; {remedy(folder)}")
    return index


def _check_fields(index: Index) -> None:
    """Raise ValueError or TypeError if a field of an index has another type or range than `write_tokens` writes."""
    texts = [index.source, index.tokenizer, index.dtype, *(x for s in index.shards for x in (s.name, s.sha256))]
    counts = [x for s in index.shards for x in (s.tokens, s.documents, s.num_bytes)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("source, tokenizer, dtype, and names and hashes of shards must be text")
    if not all(type(count) is int and 0 <= count < 1 << 48 for count in [*counts, index.vocab_size]):
        raise TypeError("numbers of tokens, documents, bytes and ids must be integers from 0 to 2^48")
    if type(index.end_of_document) is not int or not 0 <= index.end_of_document < index.vocab_size:
        raise ValueError(f"end_of_document is {index.end_of_document!r}, and there are {index.vocab_size} ids")
    if index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {index.dtype!r}; it must be uint16 or uint32")
    if foreign := [shard.name for shard in index.shards if _SHARD_NAME.fullmatch(shard.name) is None]:
        raise ValueError(f"it names the shard {foreign[0]!r}, and only files tokens-NNNNN.bin of its folder are read")


def remedy(folder: Path) -> str:
    """Return what helps if a folder of tokens is damaged, as the end of a message."""
    return f"remove {folder}, and tokenise the data again"
