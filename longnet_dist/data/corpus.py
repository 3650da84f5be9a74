"""The corpus of a run: documents are tokenised once, and read in windows, in an order that a few integers determine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.documents import Documents
from longnet_dist.data.hugging_face import HUGGING_FACE
from longnet_dist.data.shards import (
    SHARD_TOKENS,
    Index,
    TokenStream,
    check_tokens,
    holds_tokens,
    is_shard,
    read_index,
)
from longnet_dist.data.sources import find_files, standard_library
from longnet_dist.data.tokenizers import Bytes, load_tokenizer
from longnet_dist.data.writing import write_tokens
from longnet_dist.paths import local_path

_MAX_COUNTED_TOKENS, _COUNTED_AT_ONCE = 1 << 26, 1 << 22


@dataclass(frozen=True)
class Corpus:
    """A folder of tokens whose last part is held out for validation.

    Args:
        folder: the folder.
        index: the folder's index.
        validation_fraction: fraction of the tokens that is held out, from 0 to 1.
    """

    folder: Path
    index: Index
    validation_fraction: float

    @property
    def tokens_hash(self) -> str:
        """A hash of all tokens, by which a run recognises its data."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.index.shards).encode()).hexdigest()[:16]

    @property
    def train(self) -> TokenStream:
        """The tokens to train on."""
        return TokenStream(self.folder, self.index, 0, self.index.num_tokens - self._num_held_out)

    @property
    def validation(self) -> TokenStream:
        """The tokens that are held out for validation."""
        return TokenStream(self.folder, self.index, self.index.num_tokens - self._num_held_out, self.index.num_tokens)

    @property
    def _num_held_out(self) -> int:
        return int(self.index.num_tokens * self.validation_fraction)


def tokenize(
    data: Sequence[str],
    folder: Path | None,
    cache: Path,
    *,
    tokenizer: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
    allow_binary: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Tokenise documents into a folder.

    A folder that is complete is used as it is, and an interrupted tokenisation resumes.

    Args:
        data: files, folders, globs and datasets; see `find_files` and `read_documents`. If empty, Python's standard
            library.
        folder: the folder to write; by default one in `cache`, whose name depends on the data and all options.
        cache: the folder for tokenised data, and for records of which data passed its checks.
        tokenizer: file of the tokenizer; None for bytes.
        text_field: the key or column that holds the text of a row.
        seed: seed of the order of the files.
        allow_binary: whether to take files that hold no text; see `read_documents`.
        shard_tokens: approximate number of tokens per shard; see `write_tokens`.
        progress: called with the number of bytes of text tokenised so far.

    Returns:
        The folder.

    Raises:
        ValueError: if a document cannot be read (see `read_documents`), the data includes a folder of tokens, or
            `folder` lies inside the data.
    """
    loaded_tokenizer = load_tokenizer(tokenizer)
    sources = find_files(data) if data else list(standard_library())
    stats = [(str(s), *((s.stat().st_size, s.stat().st_mtime_ns) if isinstance(s, Path) else ())) for s in sources]
    source_hash = _hash([stats, seed, text_field, loaded_tokenizer.name, shard_tokens])
    folder = folder or cache / f"tokens-{source_hash}"
    _check_separate(data, sources, folder)
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed)).tolist()
    documents = Documents(
        [sources[index] for index in order],
        text_field,
        require_utf8=not isinstance(loaded_tokenizer, Bytes),
        allow_binary=allow_binary,
    )
    write_tokens(documents, loaded_tokenizer, folder, source_hash, shard_tokens, progress)
    if tokenizer is not None and not (folder / Path(tokenizer).name).exists():  # For exports of models trained on it.
        shutil.copyfile(tokenizer, folder / Path(tokenizer).name)
    return folder


def _check_separate(data: Sequence[str], sources: Sequence[Path | str], folder: Path) -> None:
    """Raise ValueError if the data includes a folder of tokens, or would include `folder` in a later run."""
    for source in sources:
        if isinstance(source, Path) and is_shard(source) and holds_tokens(source.parent):
            raise ValueError(
                f"{source.parent} is already tokenised: use train --data {source.parent}, or leave it out of the data"
            )
    target = folder.resolve()
    for path in _local_paths(data):
        root = path.resolve()
        if (
            root.is_dir()
            and target.is_relative_to(root)
            and not any(part.startswith(".") for part in target.relative_to(root).parts)
        ):
            raise ValueError(
                f"{folder} is inside --data {path}, which would include its tokens the next time: use an --out or "
                "--cache outside, or name files of that folder"
            )


def _local_paths(data: Sequence[str]) -> list[Path]:
    return [local_path(path) for path in data if not path.startswith(HUGGING_FACE)]


def num_bytes(data: Sequence[str]) -> int:
    """Return the total size of the files that `data` names, in bytes on disk; datasets count as 0."""
    return sum(p.stat().st_size for p in (find_files(data) if data else standard_library()) if isinstance(p, Path))


def num_files(data: Sequence[str]) -> int:
    """Return the number of files that `data` names; 0 for a folder of tokens, or datasets."""
    if any(holds_tokens(path) for path in _local_paths(data)):
        return 0
    return sum(isinstance(p, Path) for p in (find_files(data) if data else standard_library()))


def open_corpus(
    data: Sequence[str],
    cache: Path,
    validation_fraction: float,
    *,
    tokenizer: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
    allow_binary: bool = False,
) -> Corpus:
    """Open the tokens of `data`, tokenising it first if necessary.

    Args:
        data: a folder that `longnet-dist tokenize` wrote; or files, folders, globs and datasets, which are tokenised
            into `cache`. If empty, Python's standard library.
        cache: the folder for tokenised data, and for records of which data passed its checks.
        validation_fraction: fraction of the tokens to hold out, from 0 to 1.
        tokenizer: file of the tokenizer; None for bytes, or for the tokenizer of a folder of tokens.
        text_field: the key or column that holds the text of a row.
        seed: seed of the order of the files.
        allow_binary: whether to take files that hold no text; see `read_documents`.

    Returns:
        The corpus.

    Raises:
        ValueError: if the data cannot be read, or its tokens are damaged; the message names the file.
    """
    token_folders = [path for path in _local_paths(data) if holds_tokens(path)]
    if token_folders and len(data) > 1:
        raise ValueError(
            f"--data {token_folders[0]} is a folder of tokens, and must be the only --data: tokens cannot be combined"
        )
    if token_folders:
        folder = token_folders[0].resolve()
    else:
        folder = tokenize(
            data, None, cache, tokenizer=tokenizer, text_field=text_field, seed=seed, allow_binary=allow_binary
        )
    index = read_index(folder)
    if token_folders and tokenizer is not None and load_tokenizer(tokenizer).name != index.tokenizer:
        raise ValueError(
            f"--data {folder} is tokenised by {index.tokenizer}, and --tokenizer is {tokenizer}: leave --tokenizer out"
        )
    _check_tokens_once(folder, index, cache)
    return Corpus(folder, index, validation_fraction)


def _check_tokens_once(folder: Path, index: Index, cache: Path) -> None:
    """Call `check_tokens`, unless `cache` records that the same files passed before."""
    files = [folder / shard.name for shard in index.shards]
    stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    record = cache / f"checked-{_hash([stats, index.vocab_size])}"
    if not record.exists():
        check_tokens(folder, index)
        cache.mkdir(parents=True, exist_ok=True)
        record.touch()


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def unigram_bits(stream: TokenStream, tokens: np.ndarray) -> float:
    """Compute the bits per token of a model that knows only the frequency of each token.

    Args:
        stream: the tokens whose frequencies are known; see `count_tokens`. Each count starts at one, so that no
            frequency is 0.
        tokens: the tokens to predict.

    Returns:
        The mean of -log2(frequency) over `tokens`.
    """
    counts = count_tokens(stream) + 1.0
    return float(-np.log2(counts / counts.sum())[tokens].mean())


def count_tokens(stream: TokenStream) -> np.ndarray:
    """Count each token in a stream, at most in its first 67 million tokens; kept next to the tokens for the next call.

    Returns:
        int64, (vocabulary,).
    """
    total = min(stream.stop - stream.start, _MAX_COUNTED_TOKENS)
    tokens = _hash([*((shard.sha256, shard.tokens) for shard in stream.index.shards), stream.start])
    path = stream.folder / f"unigram-{tokens}-{total}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        counts = np.load(path, allow_pickle=False)
        if counts.shape == (stream.index.vocab_size,) and counts.dtype == np.int64 and counts.sum() == total:
            return counts
    counts = np.zeros(stream.index.vocab_size, np.int64)
    for first in range(0, total, _COUNTED_AT_ONCE):
        part = dataclasses.replace(stream, start=stream.start + first).tokens(min(_COUNTED_AT_ONCE, total - first))
        counts += np.bincount(part, minlength=len(counts))
    with contextlib.suppress(OSError):  # The folder may be read-only.
        unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
        np.save(unfinished, counts)
        os.replace(unfinished, path)
    return counts


@lru_cache(maxsize=4)
def window_order(num_windows: int, epoch: int, seed: int) -> Tensor:
    """Return the order of an epoch's windows, which depends on the arguments alone, so that a run can resume.

    Args:
        num_windows: number of windows of the stream.
        epoch: number of the epoch, from 0.
        seed: the run's seed.

    Returns:
        A permutation of 0 to num_windows - 1, int64.
    """
    return torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
