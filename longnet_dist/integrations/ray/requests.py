"""Requests to a gang: the arguments of a call, checked, and split into each rank's part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.tokenizers import Bytes, Tokenizer
from longnet_dist.integrations.ray.rank import Rows, map_file
from longnet_dist.models.config import LongNetConfig
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk

Source = Tensor | np.ndarray | Path | str
Document = Source | bytes | Sequence[int]


@dataclass(frozen=True)
class Request:
    """One operation for all ranks of a gang."""

    operation: str
    """The operation of `Rank.run`: `attention`, `score` or `embed`."""
    num_rows: int
    """N, the length of the sequence."""
    dim: int
    """The dimension of the result that holds the rows."""
    arguments: list[list[Any]]
    """The arguments of each rank."""
    folder: Path | None
    """The folder into which the ranks write the result; None to return it."""


class RequestBuilder:
    """Turns calls to a gang into requests.

    Args:
        num_ranks: number of parts into which a sequence is split.
        model: the folder of an exported model; None if the gang has none.
        tokenizer: the tokenizer for documents that are text.

    Raises:
        ValueError: if the folder holds no exported model.
    """

    def __init__(self, num_ranks: int, model: Path | None, tokenizer: Tokenizer) -> None:
        self.num_ranks, self.tokenizer = num_ranks, tokenizer
        self.config = None if model is None else _load_config(model)
        self._folders: set[Path] = set()
        """The folders that hold, or will hold, a result."""

    def attention(
        self, q: Source, k: Source, v: Source, pattern: Pattern, *, out: Path | str | None = None, **options: Any
    ) -> Request:
        """Build the request of `SequenceParallelGang.dilated_attention`."""
        if unknown := set(options) - {"causal", "scale", "kernel"}:
            raise ValueError(f"options {sorted(unknown)} are not known; there are causal, scale and kernel")
        shapes = {name: _shape(x) for name, x in (("q", q), ("k", k), ("v", v))}
        if any(len(shape) != 4 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) > 1:
            raise ValueError(f"q, k and v are {shapes}; they must be (B, N, heads, D), with the same N")
        num_rows, folder = shapes["q"][1], self._output_folder(out)
        parts = zip(*(self._split(x, pattern, num_rows, dim=1) for x in (q, k, v)), strict=True)
        arguments = [[pattern, *rows, options, out and str(folder)] for rows in parts]
        return Request("attention", num_rows, 1, arguments, folder)

    def score(self, document: Document, *, out: Path | str | None = None) -> Request:
        """Build the request of `SequenceParallelGang.score`."""
        parts, num_rows = self._split_document(document, lookahead=1)
        folder = self._output_folder(out)
        return Request("score", num_rows, 0, [[rows, out and str(folder)] for rows in parts], folder)

    def embed(
        self,
        document: Document,
        *,
        pooling: Literal["mean", "last"] | None = "mean",
        out: Path | str | None = None,
    ) -> Request:
        """Build the request of `SequenceParallelGang.embed`."""
        if pooling not in ("mean", "last", None) or (pooling and out):
            raise ValueError(
                f"pooling is {pooling!r} and out is {out!r}; pooling must be 'mean', 'last' or None, and out needs None"
            )
        parts, num_rows = self._split_document(document)
        folder = self._output_folder(out)
        return Request("embed", num_rows, 0, [[rows, pooling, out and str(folder)] for rows in parts], folder)

    def _split_document(self, document: Document, lookahead: int = 0) -> tuple[list[Any], int]:
        """Return each rank's tokens, with the `lookahead` tokens that follow them, and the number of all tokens."""
        if self.config is None:
            raise ValueError("the gang has no model: give model=FOLDER, which `longnet-dist export` wrote")
        if isinstance(document, str):
            document = document.encode()
        if isinstance(document, bytes) or (isinstance(document, Path) and document.suffix != ".npy"):
            self._check_tokenizer(document, self.config.vocab_size)
        if isinstance(document, bytes):
            document = torch.from_numpy(self.tokenizer.encode([document])[0].astype(np.int64))
        elif not isinstance(document, Tensor | np.ndarray | Path):
            document = torch.tensor(document) if document else torch.empty(0, dtype=torch.int64)
        shape = _shape(document)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"the document has shape {shape}; it must be one sequence of at least one token")
        return self._split(document, self.config.pattern, shape[0], dim=0, lookahead=lookahead), shape[0]

    def _check_tokenizer(self, document: bytes | Path, vocab_size: int) -> None:
        """Raise ValueError unless the tokenizer turns this text into tokens of the model."""
        tokenizer = self.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} ids, and the model has {vocab_size}: "
                "give the model's own, tokenizer=load_tokenizer(path)"
            )
        if isinstance(tokenizer, Bytes) and vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model has {vocab_size} ids, so its tokens are not bytes: give its tokenizer, "
                "tokenizer=load_tokenizer(path), or token ids"
            )
        if isinstance(document, Path) and not isinstance(tokenizer, Bytes):
            raise ValueError(f"{document}: ranks read bytes from a file; tokenise it, and give a .npy file of ids")

    def _split(self, x: Source, pattern: Pattern, num_rows: int, dim: int, lookahead: int = 0) -> list[Any]:
        """Return each rank's rows along `dim`: a copy of them, or the file from which the rank reads them."""
        if isinstance(x, Path | str):
            return [Rows(Path(x).resolve(), dim)] * self.num_ranks
        chunk = choose_chunk(pattern, num_rows, self.num_ranks)
        shards = [Shard(num_rows, chunk, rank, self.num_ranks) for rank in range(self.num_ranks)]
        whole = torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach()
        parts = [whole.narrow(dim, s.start, min(s.num_rows + lookahead, num_rows - s.start)) for s in shards]
        return [Rows(part.cpu().clone(), dim) for part in parts]

    def _output_folder(self, out: Path | str | None) -> Path | None:
        """Create the folder of a result, and refuse one that has a result already."""
        if out is None:
            return None
        folder = Path(out).resolve()
        if folder in self._folders or (folder / "index.json").exists():
            raise ValueError(f"{folder} holds results already, or will; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._folders.add(folder)
        return folder


def _load_config(folder: Path) -> LongNetConfig:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json; give a folder that `longnet-dist export` wrote")
    return LongNetConfig(**json.loads(path.read_text()))


def _shape(x: Source) -> tuple[int, ...]:
    """Return the shape of a tensor, array or file; of a file, only the header is read."""
    if not isinstance(x, Path | str):
        return tuple(x.shape)
    path = Path(x)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return map_file(path).shape
