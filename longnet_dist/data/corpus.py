"""What is trained on: documents, tokenised once into a folder, in windows whose order a few integers decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.shards import (
    SHARD_TOKENS,
    Index,
    TokenStream,
    check_tokens,
    holds_tokens,
    is_shard,
    read_index,
    write_tokens,
)
from longnet_dist.data.sources import HUGGING_FACE, find_files, read_documents, standard_library
from longnet_dist.data.tokenizers import Bytes, load_tokenizer
from longnet_dist.paths import local_path

_COUNTED_TOKENS = 1 << 26


@dataclass(frozen=True)
class Corpus:
    """A folder of tokens; its last part is held out for validation."""

    folder: Path
    index: Index
    validation_fraction: float

    @property
    def train(self) -> TokenStream:
        """What is trained on."""
        return TokenStream(self.folder, self.index, 0, self.index.num_tokens - self._num_held_out)

    @property
    def validation(self) -> TokenStream:
        """What is held out."""
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
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Tokenise `data`, files shuffled by `seed`, into `folder`; what is there of it already is used again.

    Args:
        data: files, folders, globs and datasets; see `find_files` and `read_documents`. None is the standard library.
        folder: where to; by default one in `cache`, named by what is tokenised and how.
        cache: see `folder`.
        tokenizer: a tokenizer's file; None is bytes.
        text_field, shard_tokens, progress: see `read_documents` and `write_tokens`.
        seed: of the order of files.

    Returns:
        The folder.

    Raises:
        ValueError: where a file holds what cannot be read, naming the place (see `read_documents`), or is tokenised
            already, or would be a part of the data the next time.
    """
    ids = load_tokenizer(tokenizer)
    sources = find_files(data) if data else list(standard_library())
    stats = [(str(s), *((s.stat().st_size, s.stat().st_mtime_ns) if isinstance(s, Path) else ())) for s in sources]
    source = hashlib.sha256(json.dumps([stats, seed, text_field, ids.name, shard_tokens]).encode()).hexdigest()[:16]
    folder = folder or cache / f"tokens-{source}"
    _check_apart(data, sources, folder)
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed)).tolist()

    def documents() -> Iterator[bytes]:
        for index in order:
            yield from read_documents(sources[index], text_field, only_text=not isinstance(ids, Bytes))

    write_tokens(documents, ids, folder, source, shard_tokens, progress)
    return folder


def _check_apart(data: Sequence[str], sources: Sequence[Path | str], folder: Path) -> None:
    """See that tokens are no part of the data: neither those of other data, nor these the next time."""
    for source in sources:
        if isinstance(source, Path) and is_shard(source) and holds_tokens(source.parent):
            raise ValueError(
                f"{source.parent} is tokenised already: train --data {source.parent}; or leave it out of the data"
            )
    for root in _local(data):
        path, inside = root.resolve(), folder.resolve()
        if (
            root.is_dir()
            and inside.is_relative_to(path)
            and not any(part.startswith(".") for part in inside.relative_to(path).parts)
        ):
            raise ValueError(
                f"{folder} lies in --data {root}, and would be a part of it the next time: give another --out or "
                "--cache, or files of that folder"
            )


def _local(data: Sequence[str]) -> list[Path]:
    return [local_path(path) for path in data if not path.startswith(HUGGING_FACE)]


def num_bytes(data: Sequence[str]) -> int:
    """Of the files that `data` names, as they are on the disk; datasets that are streamed are not known."""
    return sum(p.stat().st_size for p in (find_files(data) if data else standard_library()) if isinstance(p, Path))


def open_corpus(
    data: Sequence[str],
    cache: Path,
    validation_fraction: float,
    *,
    tokenizer: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
) -> Corpus:
    """The tokens of `data`: a folder that `longnet-dist tokenize` wrote, or what is tokenised into `cache` now.

    Raises:
        ValueError: where there is something wrong with them, naming file and byte.
    """
    tokenised = [path for path in _local(data) if holds_tokens(path)]
    if tokenised and len(data) > 1:
        raise ValueError(
            f"--data {tokenised[0]} is a folder of tokens, which must be the only one: it cannot be joined"
        )
    if tokenised:
        folder = tokenised[0].resolve()
    else:
        folder = tokenize(data, None, cache, tokenizer=tokenizer, text_field=text_field, seed=seed)
    index = read_index(folder)
    if tokenised and tokenizer is not None and load_tokenizer(tokenizer).name != index.tokenizer:
        raise ValueError(f"--data {folder} is tokenised by {index.tokenizer}, and --tokenizer is {tokenizer}")
    _check_once(folder, index, cache)
    return Corpus(folder, index, validation_fraction)


def _check_once(folder: Path, index: Index, cache: Path) -> None:
    """`check_tokens`, unless these very files have passed it before."""
    files = [folder / shard.name for shard in index.shards]
    stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    checked = cache / f"checked-{hashlib.sha256(json.dumps([stats, index.vocab_size]).encode()).hexdigest()[:16]}"
    if not checked.exists():
        check_tokens(folder, index)
        cache.mkdir(parents=True, exist_ok=True)
        checked.touch()


def unigram_bits(stream: TokenStream, tokens: np.ndarray) -> float:
    """Bits a token of a model that knows only how often each token is in the beginning of `stream`.

    (One is added to each count; no more than 67 million tokens are counted.)
    """
    counts = np.bincount(stream.tokens(_COUNTED_TOKENS), minlength=stream.index.vocab_size)
    bits = -np.log2((counts + 1.0) / (counts + 1.0).sum())
    return float(bits[tokens].mean())


@lru_cache(maxsize=4)
def window_order(num_windows: int, epoch: int, seed: int) -> Tensor:
    """The order of an epoch's windows: a few integers say where a run is."""
    return torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
