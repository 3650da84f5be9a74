"""What a run stands on: its processes and device, its folder, and its data, the same for every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from longnet_dist import internals
from longnet_dist.best_effort import print_note
from longnet_dist.checkpoints.storage import Figures, in_store, place, problem_with
from longnet_dist.data.corpus import Corpus, open_corpus
from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.distributed.patience import Patience
from longnet_dist.models.config import LongNetConfig
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.parallel import ParallelConfig
from longnet_dist.training.stopping import end_with_parent

LOCK_SECONDS = 120.0


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[torch.device]:
    """The device of this rank, with a process group where a launcher set WORLD_SIZE and none was made yet."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if restarts:
            warn_of_no_checkpoint(config)
        if restarts and internals.UNSHARED_RENDEZVOUS not in os.environ:
            warnings.warn(
                f"most restarts of torchrun fail unless {internals.UNSHARED_RENDEZVOUS}=1 is set: set it, or use "
                "launchers/torchrun.sh, which does",
                stacklevel=2,
            )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    try:
        _compare(config)
        yield device
    finally:
        if ours:
            dist.destroy_process_group()


def run_folder(config: TrainConfig, patience: Patience) -> Path:
    """The run's folder, the same on every rank: rank 0 names it and makes it."""
    # A restarted job must find its folder again: torchrun's own id, where it has one, outlives restarts.
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f") if job == "none" else job
    folder = place(patience.gather(str(config.run_folder or Path("runs") / name), "name the run's folder")[0])
    if not in_store(folder):
        folder.mkdir(parents=True, exist_ok=True)
    elif problem := patience.gather(problem_with(folder) if _rank() == 0 else None, f"write into {folder}")[0]:
        raise ValueError(problem)
    return folder


def figures_of(folder: Path, config: TrainConfig, first: bool) -> Figures:
    """What the run writes beside its checkpoints; a store's is made in `config.cache`, and copied by the first rank."""
    return Figures(folder, config.cache / "runs" / hashlib.sha256(str(folder).encode()).hexdigest()[:16], first)


@contextlib.contextmanager
def held(folder: Path, patience: Patience | None = None) -> Iterator[None]:
    """Rank 0 holds the run's folder, so that no second job writes into it. Collective.

    Args:
        folder: of the run.
        patience: on which the other ranks wait for rank 0; None in a process that is alone.

    Raises:
        ValueError: on every rank, where another job holds it, also after a while in which one that was killed ends.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if _rank() == 0:
            try:
                lock = stack.enter_context((folder / ".lock").open("w"))
                # Before the other ranks lose their patience: what stands in the way is to be said on every rank.
                seconds = min(LOCK_SECONDS, LOCK_SECONDS if patience is None else patience.limit / 2)
                locked = _locked(lock, seconds, folder)
                problem = None if locked else f"another job trains in {folder}: give another, or end it"
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    warnings.warn(f"no lock keeps a second job out of {folder}: {error}", stacklevel=3)
                elif error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # No locks there.
                    problem = f"the run's folder cannot be written: {error}"
        if problem := problem if patience is None else patience.gather(problem, f"lock {folder}")[0]:
            raise ValueError(problem)
        yield


def _locked(lock: IO[str], seconds: float, folder: Path) -> bool:
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            if not said:
                print_note(f"another job holds {folder}: waiting up to {seconds:.0f} s for it to end")
                said = True
            time.sleep(0.2)


def warn_of_no_checkpoint(config: TrainConfig) -> None:
    """Say, where a launcher restarts the run, that there is nothing to restart from."""
    if not config.checkpoint_every:
        warnings.warn(
            "no checkpoint before the end: after a failure the run begins anew; give --checkpoint-every", stacklevel=2
        )


def _compare(config: TrainConfig) -> None:
    """See that every rank was given the same options, which would otherwise make different models of one."""
    everyones = [
        {name: json.dumps(value, default=str) for name, value in options.items()}
        for options in gather_objects(dataclasses.asdict(config))
    ]
    for rank, options in enumerate(everyones):
        for name, value in options.items():
            if value != everyones[0][name]:
                raise ValueError(
                    f"every rank must have the same options: {name} is {everyones[0][name]} on rank 0, and "
                    f"{value} on rank {rank}"
                )


def corpus_of(config: TrainConfig) -> Corpus:
    """The tokenised data; the first rank of each machine makes it, then the others read it."""

    corpus, problem = None, None
    # However long it takes to tokenise: the others wait.
    patience = Patience(timedelta(days=7))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            corpus = open_corpus(
                config.data,
                config.cache,
                config.validation_fraction,
                tokenizer=config.tokenizer,
                text_field=config.text_field,
                seed=config.seed,
            )
            problem = _does_not_fit(corpus, config)
        except (ValueError, OSError) as error:
            problem = str(error)
    everyones = patience.gather((corpus, problem), "tokenise the data, or read its index")
    if problem := next((p for _, p in everyones if p), None):
        raise ValueError(problem)
    built = [c for c, _ in everyones if c is not None]
    if len({tuple(shard.sha256 for shard in c.index.shards) for c in built}) > 1:
        raise ValueError("the machines' data differ: --data must name the same files, with the same content, on each")
    # Of this rank's machine: files may have changed since, so it is not looked for again.
    return next(c for c, _ in reversed(everyones[: _rank() + 1]) if c is not None)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


_OF_THE_PLACE = {
    *("data", "corpus", "cache", "run_folder", "ranks", "rows_a_rank", "device", "parallel", "timeout", "io_timeout"),
    *("profile", "wandb", "peak_tflops", "keep_checkpoints", "keep_every", "checkpoint_every", "async_checkpoints"),
    *("validate_every", "keep_kv"),
}
"""What may change between starts of one run, without a word."""
_OF_THE_PARAMETERS = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"),
    *("tie_embeddings", "qk_norm"),
)


def changes(before: dict[str, Any], now: dict[str, Any], path: Path) -> list[str]:
    """What differs between a run's options and those that the checkpoint at `path` was written with, in words.

    Raises:
        ValueError: where its parameters are of another model.
    """
    if other := [name for name in _OF_THE_PARAMETERS if before["model"][name] != now["model"][name]]:
        said = ", ".join(f"{name} {before['model'][name]} there, {now['model'][name]} here" for name in other)
        raise ValueError(f"{path} is of another model: {said}; use its options, or another run folder")
    return [
        f"not the run that was stopped: {name} was {before[name]} and is {now[name]}"
        for name in sorted(set(before) & set(now) - _OF_THE_PLACE)
        if before[name] != now[name]
    ]


def _does_not_fit(corpus: Corpus, config: TrainConfig) -> str | None:
    needed, seq_len = corpus.index.vocab_size, config.seq_len
    if config.model.vocab_size < needed:
        return (
            f"vocab_size is {config.model.vocab_size}, and the data's tokens ({corpus.index.tokenizer}) need {needed}: "
            f"--model.vocab-size {needed}"
        )
    for name, stream in (("training", corpus.train), ("held-out", corpus.validation)):
        if stream.num_windows(seq_len) == 0:
            return (
                f"the {name} part of the data is {stream.stop - stream.start} tokens, and one sequence with the token "
                f"after it is {seq_len + 1}; give more data, a shorter seq_len, or another validation_fraction"
            )
    return None


def read_config(run: Path) -> TrainConfig:
    """The options that a run was made with, from its config.json.

    Raises:
        ValueError: where the folder is not a run's.
    """
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} holds no config.json; give the folder of a run")
    saved = json.loads(path.read_text())
    given = {f.name: saved[f.name] for f in dataclasses.fields(TrainConfig) if f.name in saved}
    given |= {"model": LongNetConfig(**saved["model"]), "parallel": ParallelConfig(**saved["parallel"])}
    return TrainConfig(**given)
