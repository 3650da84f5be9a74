"""Requests to a gang: the arguments of a call, checked, and split into each rank's part."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from longnet_dist.attention.kernels import KERNELS
from longnet_dist.data.tokenizers import Bytes, Tokenizer
from longnet_dist.integrations.ray.rows import Rows, copy_rows, map_file
from longnet_dist.models.config import LongNetConfig, read_exported_config
from longnet_dist.models.generation import Sampling
from longnet_dist.paths import local_path
from longnet_dist.plan.pattern import Pattern
from longnet_dist.plan.shard import Shard, choose_chunk

Source: TypeAlias = Tensor | np.ndarray | Path | str | ObjectRef
Document: TypeAlias = Source | bytes | Sequence[int]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Request:
    """One operation for all ranks of a gang."""

    operation: str
    """The operation of `Rank.run`: `attention`, `score`, `embed` or `generate`."""
    num_rows: int
    """N, the length of the sequence."""
    dim: int
    """The dimension of the result that holds the rows."""
    arguments: Sequence[list[Any] | ObjectRef]
    """The arguments of each rank, or an ObjectRef of them."""
    folder: Path | None
    """The folder into which the ranks write the result; None to return it."""


@dataclass(frozen=True)
class DeferredRequest:
    """A request that a Ray task builds from the values of ObjectRefs, which this process never holds."""

    operation: str
    """The operation of `Rank.run`."""
    header: ObjectRef
    """The number of rows and the dimension of the result, or as text what is wrong with the values."""
    arguments: list[ObjectRef]
    """The arguments of each rank."""
    folder: Path | None
    """The folder into which the ranks write the result; None to return it."""

    def wait(self, timeout: float) -> Request:
        """Wait until the values exist and are split, and return the request.

        Raises:
            ValueError: if the values cannot work, cannot be computed, or do not exist after `timeout` seconds.
        """
        if not ray.wait([self.header], timeout=timeout)[0]:
            ray.cancel(self.header)
            raise ValueError(
                f"the ObjectRefs of {self.operation} have no values after {timeout:g} s: do their tasks wait for "
                "resources that the gang holds? Give them others, or the gang a longer timeout"
            )
        try:
            header = ray.get(self.header)
        except RayError as error:
            for part in self.arguments:  # Ray prints the errors that nobody takes.
                with contextlib.suppress(RayError):
                    ray.get(part, timeout=0)
            cause = error.cause if isinstance(error, RayTaskError) else error
            reason = (str(cause).strip() or repr(cause)).splitlines()[0]
            raise ValueError(
                f"an ObjectRef of {self.operation} has no value ({type(cause).__name__}: {reason}); give one of a task "
                "that succeeds, or of an object that exists"
            ) from error
        if isinstance(header, str):
            raise ValueError(header)
        num_rows, dim = header
        return Request(self.operation, num_rows, dim, self.arguments, self.folder)


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

    def attention(
        self, q: Source, k: Source, v: Source, pattern: Pattern, *, out: Path | str | None = None, **options: Any
    ) -> Request | DeferredRequest:
        """Build the request of `SequenceParallelGang.dilated_attention`."""
        _check_attention_options(pattern, options)
        inputs = {"q": q, "k": k, "v": v}
        if any(isinstance(x, ObjectRef) for x in inputs.values()):
            values = [x if isinstance(x, ObjectRef) else _array_or_path(name, x) for name, x in inputs.items()]
            return self._defer("attention", values, out, pattern=pattern, **options)
        sources = {name: _array_or_path(name, x) for name, x in inputs.items()}
        shapes = {name: _shape(x) for name, x in sources.items()}
        if any(len(shape) != 4 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) > 1:
            raise ValueError(f"q, k and v are {shapes}; they must be (B, N, heads, D), with the same N")
        for name, x in sources.items():
            dtype = _dtype(x)
            if not (dtype in _FLOATS if isinstance(dtype, torch.dtype) else dtype.char in "efd"):
                raise ValueError(f"{name} is of {dtype}; it must be of float16, bfloat16, float32 or float64")
        num_rows, folder = shapes["q"][1], _output_folder(out)
        parts = zip(*(self._split(x, pattern, num_rows, dim=1) for x in sources.values()), strict=True)
        arguments = [[pattern, *rows, options, folder and str(folder)] for rows in parts]
        return Request("attention", num_rows, 1, arguments, folder)

    def score(self, document: Document, *, out: Path | str | None = None) -> Request | DeferredRequest:
        """Build the request of `SequenceParallelGang.score`."""
        if isinstance(document, ObjectRef):
            return self._defer("score", [document], out)
        parts, num_rows = self._split_document(document, lookahead=1)
        folder = _output_folder(out)
        return Request("score", num_rows, 0, [[rows, folder and str(folder)] for rows in parts], folder)

    def embed(
        self,
        document: Document,
        *,
        pooling: Literal["mean", "last"] | None = "mean",
        out: Path | str | None = None,
    ) -> Request | DeferredRequest:
        """Build the request of `SequenceParallelGang.embed`."""
        if pooling not in ("mean", "last", None) or (pooling and out is not None):
            raise ValueError(
                f"pooling is {pooling!r} and out is {out!r}; pooling must be 'mean', 'last' or None, and out needs None"
            )
        if isinstance(document, ObjectRef):
            return self._defer("embed", [document], out, pooling=pooling)
        parts, num_rows = self._split_document(document)
        folder = _output_folder(out)
        return Request("embed", num_rows, 0, [[rows, pooling, folder and str(folder)] for rows in parts], folder)

    def generate(
        self,
        document: Document,
        max_new_tokens: int,
        *,
        stop: Sequence[int] = (),
        seed: int = 0,
        out: None = None,
        **sampling: Any,
    ) -> Request | DeferredRequest:
        """Build the request of `SequenceParallelGang.generate`."""
        options = max_new_tokens, Sampling(**sampling), tuple(stop), seed
        if isinstance(document, ObjectRef):
            return self._defer(
                "generate", [document], out, **sampling, max_new_tokens=max_new_tokens, stop=stop, seed=seed
            )
        parts, rows = self._split_document(document)
        return Request("generate", rows, 0, [[part, *options] for part in parts], None)

    def _defer(self, operation: str, sources: list[Any], out: Path | str | None, **options: Any) -> DeferredRequest:
        """Start a task that builds the request where the values of the ObjectRefs are, and reserves nothing."""
        if operation != "attention":
            self._check_model()
        folder = _output_folder(out)
        task = ray.remote(_build).options(num_cpus=0, num_returns=1 + self.num_ranks)
        are_refs = [isinstance(x, ObjectRef) for x in sources]
        header, *arguments = task.remote(self, operation, are_refs, options | {"out": folder}, *sources)
        return DeferredRequest(operation, header, arguments, folder)

    def _check_model(self) -> LongNetConfig:
        if self.config is None:
            raise ValueError("the gang has no model: give model=FOLDER, which `longnet-dist export` wrote")
        return self.config

    def _split_document(self, document: Document, lookahead: int = 0) -> tuple[list[Any], int]:
        """Return each rank's tokens, with the `lookahead` tokens that follow them, and the number of all tokens."""
        config = self._check_model()
        if isinstance(document, str):
            document = document.encode()
        if isinstance(document, bytearray | memoryview):
            document = bytes(document)
        if isinstance(document, bytes) or (isinstance(document, Path) and document.suffix != ".npy"):
            self._check_tokenizer(document, config.vocab_size)
        if isinstance(document, bytes):
            document = self.tokenizer.encode([document])[0]
        elif isinstance(document, Sequence):
            document = _array_of_ids(document)
        source = _array_or_path("the document", document, "text, bytes, token ids or a Path")
        shape, dtype = _shape(source), _dtype(source)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"the document has shape {shape}; it must be one sequence of at least one token")
        if not (dtype in _INTEGERS if isinstance(dtype, torch.dtype) else dtype.kind in "iu"):
            raise ValueError(f"token ids are {dtype}; they must be integers")
        return self._split(source, config.pattern, shape[0], dim=0, lookahead=lookahead), shape[0]

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

    def _split(
        self, x: Tensor | np.ndarray | Path, pattern: Pattern, num_rows: int, dim: int, lookahead: int = 0
    ) -> list[Rows]:
        """Return each rank's rows along `dim`: a copy of them, or the file from which the rank reads them."""
        if isinstance(x, Path):
            return [Rows(x, dim)] * self.num_ranks
        chunk = choose_chunk(pattern, num_rows, self.num_ranks)
        shards = [Shard(num_rows, chunk, rank, self.num_ranks) for rank in range(self.num_ranks)]
        return [Rows(copy_rows(x, s.start, min(s.stop + lookahead, num_rows), dim), dim) for s in shards]


def _build(
    builder: RequestBuilder, operation: str, are_refs: list[bool], options: dict[str, Any], *sources: Any
) -> list[Any]:
    """Build a request in a Ray task, for which Ray replaces each ObjectRef in `sources` by its value.

    Returns:
        The number of rows and the dimension of the result, or as text what is wrong; and the arguments of each rank.
    """
    try:
        for source, is_ref in zip(sources, are_refs, strict=True):
            if is_ref and (isinstance(source, Path) or (isinstance(source, str) and operation == "attention")):
                raise ValueError(f"an ObjectRef holds the path {source}; give the path itself")
            if isinstance(source, ObjectRef):
                raise ValueError("an ObjectRef holds another ObjectRef; give the inner one")
        request = getattr(builder, operation)(*sources, **options)
    except ValueError as error:
        return [str(error), *[None] * builder.num_ranks]
    return [(request.num_rows, request.dim), *request.arguments]


def _output_folder(out: Path | str | None) -> Path | None:
    """Return the absolute path of the folder of a result."""
    if out is None:
        return None
    if not isinstance(out, Path | str):
        raise ValueError(f"out is {out!r}; it must be the path of a folder, or None")
    return Path(os.path.realpath(local_path(out)))


def _load_config(folder: Path) -> LongNetConfig:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json; give a folder that `longnet-dist export` wrote")
    try:
        return read_exported_config(folder)[0]
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a model that `longnet-dist export` wrote: {error}") from None


def _check_attention_options(pattern: Pattern, options: dict[str, Any]) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern is {pattern!r}; it must be a longnet_dist.Pattern")
    if unknown := set(options) - {"causal", "scale", "kernel"}:
        raise ValueError(f"options {sorted(unknown)} are not known; there are causal, scale and kernel")
    causal, scale, kernel = options.get("causal", False), options.get("scale"), options.get("kernel", "auto")
    if not isinstance(causal, bool):
        raise ValueError(f"causal is {causal!r}; it must be True or False")
    if scale is not None and not (is_number(scale) and math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; it must be None or a finite number")
    if not isinstance(kernel, str) or kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel is {kernel!r}; it must be one of auto, {', '.join(KERNELS)}")


def is_number(value: object) -> bool:
    """Return whether a value is a real number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _array_of_ids(ids: Sequence[Any]) -> np.ndarray:
    """Return a sequence of token ids as an array."""
    if not len(ids):
        return np.empty(0, np.int64)
    if isinstance(ids[0], ObjectRef):
        raise ValueError("the document is a sequence of ObjectRefs; it must be one ObjectRef, of the whole document")
    try:
        return np.asarray(ids)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the document is not one sequence of token ids: {error}") from None


def _array_or_path(
    name: str, x: Any, forms: str = "a tensor, a NumPy array or the path of a .npy file"
) -> Tensor | np.ndarray | Path:
    """Return the argument `name`, as an absolute path if it is one.

    Raises:
        ValueError: if it is a missing file, not a dense tensor with values, or nothing of the kind.
    """
    if isinstance(x, Path | str):
        path = local_path(x)
        if not path.is_file():
            raise ValueError(f"{name} is {path}: no such file")
        return path.resolve()
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.is_nested:
            raise ValueError(f"{name} is a sparse or nested tensor; it must be dense")
        if x.device.type == "meta":
            raise ValueError(f"{name} is on the device meta, and has no values; give a tensor with values")
        if type(x.detach()) is not Tensor:
            raise ValueError(f"{name} is a {type(x).__name__}; it must be a plain tensor, such as x.full_tensor()")
    elif not isinstance(x, np.ndarray):
        raise ValueError(f"{name} is {_abridged(x)}; it must be {forms}")
    return x


def _abridged(x: object) -> str:
    """Return the representation of a value, cut to the length of a line."""
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shape(x: Tensor | np.ndarray | Path) -> tuple[int, ...]:
    """Return the shape of a tensor, array or file; of a file, only the header is read."""
    return tuple(map_file(x).shape if isinstance(x, Path) else x.shape)


def _dtype(x: Tensor | np.ndarray | Path) -> torch.dtype | np.dtype:
    """Return the dtype of a tensor, array or file; of a file, only the header is read."""
    return map_file(x).dtype if isinstance(x, Path) else x.dtype
