"""`SequenceParallelGang`: resident Ray actors that share one long sequence, for attention, scores and embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from longnet_dist.data.tokenizers import Bytes, Tokenizer
from longnet_dist.integrations.ray.calls import Call, CallQueue
from longnet_dist.integrations.ray.connection import connect
from longnet_dist.integrations.ray.crew import Crew
from longnet_dist.integrations.ray.requests import DeferredRequest, Document, Request, RequestBuilder, Source, is_number
from longnet_dist.paths import local_path
from longnet_dist.plan.pattern import Pattern
from longnet_dist.training.config import check_resources

_MIN_SECONDS, _MAX_SECONDS = 1e-3, 1e9


class SequenceParallelGang:
    """A gang of Ray actors in one placement group; each is a rank that holds one contiguous chunk of a sequence.

    Args:
        num_ranks: number of actors.
        model: a folder that `longnet-dist export` wrote and that every node sees; each rank loads it once. None for
            attention alone.
        cpus_per_rank: CPUs that each actor reserves.
        gpus_per_rank: GPUs that each actor reserves; with a GPU, ranks use NCCL, else gloo.
        labels: Ray's label selector for the nodes that may run ranks; None for any node.
        placement: Ray's placement strategy; PACK keeps ranks together, SPREAD uses many nodes.
        timeout: time limit in seconds of one collective, and of one whole call.
        form_timeout: time limit in seconds for the gang to form: resources, processes, weights.
        retries: how often a call is repeated after the loss of a rank, before it raises `GangError`.
        tokenizer: the tokenizer for documents that are text; bytes by default.

    Raises:
        GangError: if the gang cannot form in time; names the resources that the cluster lacks.
        ValueError: for arguments that cannot work, or if no cluster answers at RAY_ADDRESS.

    Example (on a cluster, or on this machine alone)::

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
        _check_numbers(num_ranks, retries, timeout, form_timeout)
        check_resources(cpus_per_rank, gpus_per_rank, placement)
        _check_objects(model, labels, tokenizer)
        self.num_ranks, self.retries = num_ranks, retries
        self.model = None if model is None else Path(os.path.realpath(local_path(model)))
        self.tokenizer: Tokenizer = tokenizer or Bytes()
        self._requests = RequestBuilder(num_ranks, self.model, self.tokenizer)
        self.config = self._requests.config
        bundle: dict[str, float] = {"CPU": float(cpus_per_rank)}
        if gpus_per_rank:
            bundle["GPU"] = float(gpus_per_rank)
        self._crew = Crew(num_ranks, bundle, labels, placement, timeout, form_timeout, self.model)
        self._calls = CallQueue(self._crew)
        self._closed = False
        connect()
        try:
            self._crew.ensure_alive()
        except BaseException:
            self.close()
            raise

    def dilated_attention(
        self, q: Source, k: Source, v: Source, pattern: Pattern, *, out: Path | str | None = None, **options: Any
    ) -> Any:
        """Compute `longnet_dist.dilated_attention` over the gang.

        Args:
            q: queries, (B, N, H, D): a tensor or array, whose rows are sent to their ranks; or the path of a `.npy`
                file that every node sees, from which each rank reads its own rows; or an `ObjectRef` of a tensor or
                array, which this process then need not hold.
            k, v: keys and values, (B, N, G, D), in any of these forms.
            pattern: the branches.
            out: a folder that every node sees, for the result: one `.npy` file per rank, and `index.json`. None to
                return the result.
            options: `causal`, `scale` and `kernel`, as for `longnet_dist.dilated_attention`.

        Returns:
            (B, N, H, D), or the path of `out`.

        Raises:
            GangError: if a rank is lost or does not answer in time.
            ValueError: for arguments that cannot work.
        """
        return self.submit("dilated_attention", q, k, v, pattern, out=out, **options).result()

    def score(self, document: Document, *, out: Path | str | None = None) -> Any:
        """Return the log-likelihood, in nats, of each token of a document given the tokens before it.

        The first token has none.

        Args:
            document: text or bytes; token ids of any integer type; the `Path` of a `.npy` file of ids; or the `Path` of
                any other file, whose bytes are the tokens. Each rank reads only its own rows of a file. Or the
                `ObjectRef` of text, bytes or token ids, which this process then need not hold.
            out: as for `dilated_attention`.

        Returns:
            (N - 1,), float32 (float64 for a float64 model); or the path of `out`.

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
        """Return the model's features of a document, after the norm that follows the last layer.

        Args:
            document: as for `score`.
            pooling: `mean` for the mean over all tokens, `last` for the last token, None for every token.
            out: as for `dilated_attention`; only without pooling.

        Returns:
            (d_model,); without pooling (N, d_model), or the path of `out`.

        Raises:
            GangError, ValueError: as for `dilated_attention`.
        """
        return self.submit("embed", document, pooling=pooling, out=out).result()

    def generate(
        self,
        document: Document,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int = 0,
    ) -> Any:
        """Return how the model continues a document, which all ranks read together, in memory of a constant size.

        Args:
            document: as for `score`.
            max_new_tokens, temperature, top_k, top_p, stop, seed: see `LongNet.generate`.

        Returns:
            The new tokens, int64, (T,), T <= max_new_tokens; the last one may be of `stop`.

        Raises:
            GangError, ValueError: as for `dilated_attention`.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop, "seed": seed}
        return self.submit("generate", document, max_new_tokens, **options).result()

    def submit(
        self, method: Literal["dilated_attention", "score", "embed", "generate"], *arguments: Any, **options: Any
    ) -> Call:
        """Queue a call to one of the methods above, and return without waiting for it.

        Calls run in the order of submission.

        Args:
            method: the method's name.
            arguments, options: the method's arguments.

        Raises:
            ValueError: for arguments that cannot work. What an `ObjectRef` holds is checked later, and raises in the
                call's `result`.

        Example::

            calls = [gang.submit("score", path) for path in paths]
            scores = [call.result() for call in calls]
        """
        if self._closed:
            raise ValueError("the gang is closed")
        builders: dict[str, Callable[..., Request | DeferredRequest]] = {
            "dilated_attention": self._requests.attention,
            "score": self._requests.score,
            "embed": self._requests.embed,
            "generate": self._requests.generate,
        }
        if not isinstance(method, str) or method not in builders:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(builders)}")
        return self._calls.submit(builders[method](*arguments, **options), self.retries)

    def stats(self) -> dict[str, Any]:
        """Return the gang's counters and each rank's statistics.

        Returns:
            `calls`, `failed` (attempts that lost a rank), `formed` (how often the gang formed), and `ranks`: the node,
            process, memory and seconds of each. `ranks` is empty while the gang forms.
        """
        return self._calls.counts | {"formed": self._crew.formed, "ranks": self._crew.stats()}

    def close(self, cancel: bool = False) -> None:
        """End the actors and release their resources, after the calls that were submitted before.

        Args:
            cancel: cancel the calls that have not started.
        """
        if not self._closed:
            self._closed = True
            if cancel or not self._crew.formed:
                self._crew.closing.set()
            self._calls.close(cancel)
            self._crew.close()

    def __enter__(self) -> SequenceParallelGang:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=error_type is not None)


def _check_numbers(num_ranks: int, retries: int, timeout: float, form_timeout: float) -> None:
    for name, count, least in (("num_ranks", num_ranks, 1), ("retries", retries, 0)):
        if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
            raise ValueError(f"{name} is {count!r}; it must be a whole number of at least {least}")
    for name, seconds in (("timeout", timeout), ("form_timeout", form_timeout)):
        if not (is_number(seconds) and _MIN_SECONDS <= seconds <= _MAX_SECONDS):
            raise ValueError(f"{name} is {seconds!r}; it must be from {_MIN_SECONDS} to {_MAX_SECONDS:.0e} seconds")


def _check_objects(model: object, labels: object, tokenizer: object) -> None:
    if model is not None and not isinstance(model, Path | str):
        raise ValueError(f"model is {model!r}; it must be the path of a folder, or None")
    if labels is not None and not (
        isinstance(labels, dict) and all(isinstance(text, str) for text in (*labels, *labels.values()))
    ):
        raise ValueError(f"labels is {labels!r}; it must be a dictionary of text to text, or None")
    if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ("name", "vocab_size", "encode")):
        raise ValueError(f"tokenizer is {tokenizer!r}; it must be a Tokenizer, such as load_tokenizer(path)")
