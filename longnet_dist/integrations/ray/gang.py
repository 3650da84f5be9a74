"""A resident gang of Ray actors that hold one sequence together: attention, scores and embeddings of long documents."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.tokenizers import Bytes, Tokenizer
from longnet_dist.integrations.ray.crew import Crew, GangError, connect
from longnet_dist.integrations.ray.rank import Rows, describe_files, mapped
from longnet_dist.models.config import LongNetConfig
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk

Source = Tensor | np.ndarray | Path | str
Document = Source | bytes | Sequence[int]
_Prepared = tuple[str, int, int, list[list[Any]], Path | None]
"""What every rank is to run, the rows, their dimension, each rank's arguments, and where the result is left."""


class Call:
    """A request to a gang; requests are done in the order in which they were made."""

    def __init__(self, future: Future[Any], progress: Callable[[], float]) -> None:
        self._future, self._progress = future, progress

    def result(self, timeout: float | None = None) -> Any:
        """What was asked for, when it is there.

        Args:
            timeout: seconds to wait; the gang's own limits hold in any case.

        Raises:
            GangError: where a rank was lost, or did not answer in time.
            TimeoutError: where `timeout` is over.
        """
        try:
            return self._future.result(timeout)
        except FutureTimeoutError:
            if self._future.done():
                raise
            raise TimeoutError(f"no result in {timeout:g} s; the call goes on") from None

    def done(self) -> bool:
        """Whether it ended."""
        return self._future.done()

    def progress(self) -> float:
        """0 to 1: how far the slowest rank is in the model's layers."""
        if self.done():
            return 1.0
        return self._progress() if self._future.running() else 0.0


class SequenceParallelGang:
    """Actors of Ray, each a rank that holds one contiguous chunk of a sequence, in one placement group.

    Args:
        num_ranks: actors.
        model: a folder that `longnet-dist export` wrote, which every node sees; loaded once. None for attention alone.
        cpus_per_rank, gpus_per_rank: what each actor reserves; with a GPU it uses NCCL, else gloo.
        labels: of the nodes that may hold ranks, Ray's label selector.
        placement: Ray's strategy; PACK keeps ranks together, SPREAD takes many nodes.
        timeout: seconds that one collective, and one call as a whole, may take.
        form_timeout: seconds that forming may take: resources, processes, weights.
        retries: how often a call that lost a rank is made again, before it is an error.
        tokenizer: of documents given as text; bytes by default.

    Raises:
        GangError: where the gang cannot form in time, with what the cluster lacks.
        ValueError: for arguments that cannot work.

    Example (on a cluster, or alone)::

        with SequenceParallelGang(4, model="exported/") as gang:
            log_likelihoods = gang.score(Path("book.txt"))
            vector = gang.embed(Path("book.txt"))
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        model: Path | str | None = None,
        cpus_per_rank: int = 1,
        gpus_per_rank: int = 0,
        labels: dict[str, str] | None = None,
        placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK",
        timeout: float = 600.0,
        form_timeout: float = 300.0,
        retries: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for name, value, least in (("num_ranks", num_ranks, 1), ("timeout", timeout, 1e-3), ("retries", retries, 0)):
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.num_ranks, self.retries = num_ranks, retries
        self.model = None if model is None else Path(model).resolve()
        self.config = None if self.model is None else _config_of(self.model)
        self.tokenizer: Tokenizer = tokenizer or Bytes()
        bundle: dict[str, float] = {"CPU": float(cpus_per_rank)}
        if gpus_per_rank:
            bundle["GPU"] = float(gpus_per_rank)
        self._crew = Crew(num_ranks, bundle, labels, placement, timeout, form_timeout, self.model)
        self._counts = {"calls": 0, "failed": 0}
        self._closed = False
        self._folders: set[Path] = set()
        """Where results are, or will be, left."""
        self._in_order = ThreadPoolExecutor(1, "gang")
        connect()
        try:
            self._crew.see_that_all_live()
        except BaseException:
            self.close()
            raise

    def dilated_attention(
        self, q: Source, k: Source, v: Source, pattern: Pattern, *, out: Path | str | None = None, **options: Any
    ) -> Any:
        """`longnet_dist.dilated_attention` over the gang.

        Args:
            q, k, v: (B, N, H, D) and (B, N, G, D), tensors or arrays, of which each rank is sent its rows; or `.npy`
                files, of which each reads its own.
            pattern: the branches.
            out: a folder, which every node sees, to leave the result in, a `.npy` a rank and `index.json`.
            options: `causal`, `scale` and `kernel`, as there.

        Returns:
            (B, N, H, D), or `out`.

        Raises:
            GangError: where a rank is lost, or does not answer in time.
            ValueError: for arguments that cannot work.
        """
        return self.submit("dilated_attention", q, k, v, pattern, out=out, **options).result()

    def score(self, document: Document, *, out: Path | str | None = None) -> Any:
        """The log-likelihood, in nats, of each token of a document but the first, given those before it.

        Args:
            document: text or bytes; token ids; a `Path` to a `.npy` of ids, or to any other file, whose bytes are the
                tokens. Of a file each rank reads its own rows.
            out: as for `dilated_attention`.

        Returns:
            (N - 1,), float32 (float64 for float64); or `out`.

        Raises:
            GangError, ValueError: as for `dilated_attention`.
        """
        return self.submit("score", document, out=out).result()

    def embed(
        self,
        document: Document,
        *,
        pooling: Literal["mean", "last"] | None = "mean",
        out: Path | str | None = None,
    ) -> Any:
        """What the model makes of a document: its features after the last layer's norm.

        Args:
            document: as for `score`.
            pooling: their mean, or the last token's; None for all of them.
            out: as for `dilated_attention`; only without pooling.

        Returns:
            (d_model,), or without pooling (N, d_model), or `out`.

        Raises:
            GangError, ValueError: as for `dilated_attention`.
        """
        return self.submit("embed", document, pooling=pooling, out=out).result()

    def submit(self, method: Literal["dilated_attention", "score", "embed"], *arguments: Any, **options: Any) -> Call:
        """Ask for one of the methods, without waiting for it; calls are done in order.

        Raises:
            ValueError: for arguments that cannot work.
        """
        if self._closed:
            raise ValueError("the gang is closed")
        known: dict[str, Callable[..., _Prepared]]
        known = {"dilated_attention": self._attention, "score": self._score, "embed": self._embed}
        if method not in known:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(known)}")
        prepared = known[method](*arguments, **options)
        return Call(self._in_order.submit(self._run, *prepared), self._crew.progress)

    def stats(self) -> dict[str, Any]:
        """Calls, failures and formings; of each rank its node, process, memory, seconds (of none while it forms)."""
        return self._counts | {"formed": self._crew.formed, "ranks": self._crew.stats()}

    def close(self, cancel: bool = False) -> None:
        """End the actors, and give back what they reserved; what was asked for before is done first, or cancelled."""
        if not self._closed:
            self._closed = True
            if cancel or not self._crew.formed:
                self._crew.closing.set()
            self._in_order.shutdown(cancel_futures=cancel)
            self._crew.close()

    def __enter__(self) -> SequenceParallelGang:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _attention(
        self, q: Source, k: Source, v: Source, pattern: Pattern, *, out: Path | str | None = None, **options: Any
    ) -> _Prepared:
        if unknown := set(options) - {"causal", "scale", "kernel"}:
            raise ValueError(f"options {sorted(unknown)} are not known; there are causal, scale and kernel")
        lengths = {name: _shape(x) for name, x in (("q", q), ("k", k), ("v", v))}
        if any(len(shape) != 4 for shape in lengths.values()) or len({shape[1] for shape in lengths.values()}) > 1:
            raise ValueError(f"q, k and v are {lengths}; they must be (B, N, heads, D), of one N")
        num_rows, folder = lengths["q"][1], self._folder(out)
        parts = zip(*(self._cut(x, pattern, num_rows, dim=1) for x in (q, k, v)), strict=True)
        return "attention", num_rows, 1, [[pattern, *rows, options, out and str(folder)] for rows in parts], folder

    def _score(self, document: Document, *, out: Path | str | None = None) -> _Prepared:
        rows, num_rows = self._document(document, ahead=1)
        folder = self._folder(out)
        return "score", num_rows, 0, [[part, out and str(folder)] for part in rows], folder

    def _embed(
        self,
        document: Document,
        *,
        pooling: Literal["mean", "last"] | None = "mean",
        out: Path | str | None = None,
    ) -> _Prepared:
        if pooling not in ("mean", "last", None) or (pooling and out):
            raise ValueError(
                f"pooling is {pooling!r} and out {out!r}; pooling is 'mean', 'last', or None, and only then out"
            )
        rows, num_rows = self._document(document)
        folder = self._folder(out)
        return "embed", num_rows, 0, [[part, pooling, out and str(folder)] for part in rows], folder

    def _document(self, document: Document, ahead: int = 0) -> tuple[list[Any], int]:
        """Each rank's rows of the tokens, with some that follow them, and how many there are in all."""
        if self.config is None:
            raise ValueError("the gang has no model: give model=FOLDER, which `longnet-dist export` wrote")
        if isinstance(document, str):
            document = document.encode()
        if isinstance(document, bytes) or (isinstance(document, Path) and document.suffix != ".npy"):
            self._check_text(document, self.config.vocab_size)
        if isinstance(document, bytes):
            document = torch.from_numpy(self.tokenizer.encode([document])[0].astype(np.int64))
        elif not isinstance(document, Tensor | np.ndarray | Path):
            document = torch.tensor(document) if document else torch.empty(0, dtype=torch.int64)
        shape = _shape(document)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"the document is {shape}; it must be one sequence of at least one token")
        return self._cut(document, self.config.pattern, shape[0], dim=0, ahead=ahead), shape[0]

    def _check_text(self, document: bytes | Path, vocab_size: int) -> None:
        """See that text would become tokens of the model."""
        tokenizer = self.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} ids, and the model {vocab_size}: give "
                "the model's own, tokenizer=load_tokenizer(path)"
            )
        if isinstance(tokenizer, Bytes) and vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model has {vocab_size} ids, so its tokens are no bytes: give its tokenizer, "
                "tokenizer=load_tokenizer(path), or token ids"
            )
        if isinstance(document, Path) and not isinstance(tokenizer, Bytes):
            raise ValueError(f"{document}: ranks read bytes from a file; tokenise it, and give a .npy of ids")

    def _cut(self, x: Source, pattern: Pattern, num_rows: int, dim: int, ahead: int = 0) -> list[Any]:
        """What each rank is sent: where to read, or its rows, put into the object store."""
        if isinstance(x, Path | str):
            return [Rows(Path(x).resolve(), dim)] * self.num_ranks
        chunk = choose_chunk(pattern, num_rows, self.num_ranks)
        shards = [Shard(num_rows, chunk, rank, self.num_ranks) for rank in range(self.num_ranks)]
        whole = torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach()
        parts = [whole.narrow(dim, s.start, min(s.num_rows + ahead, num_rows - s.start)) for s in shards]
        return [Rows(part.cpu().clone(), dim) for part in parts]

    def _run(self, name: str, num_rows: int, dim: int, arguments: list[list[Any]], folder: Path | None) -> Any:
        """A call to its end, in the thread of calls."""
        self._counts["calls"] += 1
        for attempt in range(self.retries + 1):
            try:
                results = self._crew.run(name, num_rows, arguments)
                break
            except GangError:
                self._counts["failed"] += 1
                if attempt == self.retries:
                    # In the thread of calls: the next finds it formed, and the caller of this one need not wait.
                    with contextlib.suppress(RuntimeError):  # It is closed meanwhile.
                        self._in_order.submit(self._form_quietly)
                    raise
        if folder is not None:
            describe_files(folder, results, num_rows, dim)
            return folder
        # Of what is pooled, the first rank has it all.
        return results[0] if name == "embed" and results[-1] is None else torch.cat(results, dim)

    def _folder(self, out: Path | str | None) -> Path | None:
        """Where results are left, made where it is not there."""
        if out is None:
            return None
        folder = Path(out).resolve()
        if folder in self._folders or (folder / "index.json").exists():
            raise ValueError(f"{folder} holds results already, or will; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._folders.add(folder)
        return folder

    def _form_quietly(self) -> None:
        with contextlib.suppress(GangError):  # The next call tries again, and says so.
            self._crew.see_that_all_live()


def _config_of(folder: Path) -> LongNetConfig:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json; give a folder that `longnet-dist export` wrote")
    return LongNetConfig(**json.loads(path.read_text()))


def _shape(x: Source) -> tuple[int, ...]:
    """Of a tensor or array, or of what a file holds, of which no more than the head is read."""
    if not isinstance(x, Path | str):
        return tuple(x.shape)
    path = Path(x)
    if not path.is_file():
        raise ValueError(f"{path}: no file there")
    return mapped(path).shape
