"""What a run needs before its first step: a locked folder, data, and options that fit its checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from longnet_dist.best_effort import print_note
from longnet_dist.checkpoints.storage import RunFiles, as_os_error, in_store, storage_path, write_problem
from longnet_dist.data.corpus import Corpus, count_tokens, open_corpus
from longnet_dist.data.tokenizers import Bytes, load_tokenizer
from longnet_dist.distributed.patience import Patience
from longnet_dist.models.config import BYTES_VOCABULARY, LongNetConfig
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.parallel import AXES, ParallelConfig

LOCK_SECONDS = 120.0
"""How long to wait for another job to release the run folder."""


def name_run_folder(config: TrainConfig, patience: Patience) -> Path:
    """Return the run folder, the same on every rank: that of the options, or one named by time and job. Collective.

    Args:
        config: the run's options.
        patience: the means by which ranks wait for rank 0.
    """
    text = patience.gather(str(config.run_folder or Path("runs") / _run_name()), "name the run's folder")[0]
    return storage_path(text)


def create_run_folder(folder: Path, patience: Patience) -> None:
    """Make sure that the run folder can be written. Collective.

    Args:
        folder: the run folder.
        patience: the means by which ranks wait for rank 0.

    Raises:
        ValueError: on every rank, if the folder is in a store that cannot be written.
    """
    if not in_store(folder):
        folder.mkdir(parents=True, exist_ok=True)
    elif problem := patience.gather(write_problem(folder) if _rank() == 0 else None, f"write into {folder}")[0]:
        raise ValueError(problem)


def fit_to_ranks(config: TrainConfig, folder: Path, num_ranks: int, patience: Patience) -> TrainConfig:
    """Return the options, with axes for this number of ranks if the run in `folder` had another number. Collective.

    An elastic launcher restarts a run on the machines that are left, with the same options
    (docs/decisions/elastic-arrangement.md).

    Args:
        config: the run's options.
        folder: the run folder.
        num_ranks: number of all ranks.
        patience: the means by which ranks wait for rank 0.

    Raises:
        ValueError: if `parallel.sp` is fixed and does not fit.
    """
    ranks = None
    if _rank() == 0:
        with contextlib.suppress(OSError, ValueError), as_os_error():
            ranks = json.loads((folder / "config.json").read_text()).get("ranks")
    ranks = patience.gather(ranks, "read config.json")[0]
    if ranks in (None, num_ranks):
        return config
    parallel = config.parallel.fitting(num_ranks, config.batch_size)
    if parallel != config.parallel and _rank() == 0:
        axes = ", ".join(f"{name} {degree}" for name, degree in zip(AXES, parallel.degrees(num_ranks), strict=True))
        print_note(f"the run in {folder} had {ranks} ranks, and has {num_ranks} now: {axes}")
    return dataclasses.replace(config, parallel=parallel)


def num_data_ranks(config: TrainConfig, num_ranks: int) -> int:
    """Return the number of data-parallel ranks, each of which has sequences of its own.

    Raises:
        ValueError: if the sequences of a forward cannot be divided among them.
    """
    replicate, shard, _ = config.parallel.degrees(num_ranks)
    if config.batch_size % (replicate * shard):
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of the {replicate * shard} data-parallel ranks "
            "(dp_replicate x dp_shard) that share it"
        )
    return replicate * shard


def _run_name() -> str:
    """Return a name for a new run folder, by which a job that torchrun restarts finds its folder again."""
    job, now = os.environ.get("TORCHELASTIC_RUN_ID", "none"), datetime.now(UTC)
    if job == "none":
        return now.strftime("%Y%m%d-%H%M%S-%f")
    if not re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", job):
        return job  # The user's --rdzv-id.
    before = next(Path("runs").glob(f"*-{job[:8]}"), None)
    return now.strftime("%Y%m%d-%H%M%S-") + job[:8] if before is None else before.name


def local_run_files(folder: Path, config: TrainConfig, upload: bool) -> RunFiles:
    """Return the run's files other than checkpoints, which lie in `config.cache` if the run folder is in a store.

    Args:
        folder: the run folder.
        config: the run's options.
        upload: whether this process uploads them to the store. One process of a run does.
    """
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return RunFiles(folder, config.cache / "runs" / name, upload)


@contextlib.contextmanager
def lock_run_folder(folder: Path, patience: Patience | None = None) -> Iterator[None]:
    """Inside the context, hold a lock on rank 0, so that no second job writes into the run folder. Collective.

    Args:
        folder: the run folder, on a file system.
        patience: the means by which the other ranks wait for rank 0; None in a process that is alone.

    Raises:
        ValueError: on every rank, if another job holds the lock and does not end within `LOCK_SECONDS`.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if _rank() == 0:
            # Fail before the other ranks' limit, so that every rank raises this error.
            seconds = min(LOCK_SECONDS, LOCK_SECONDS if patience is None else patience.limit / 2)
            problem = _lock(folder, seconds, stack)
        if patience is not None:
            problem = patience.gather(problem, f"lock {folder}")[0]
        if problem:
            raise ValueError(problem)
        yield


def _lock(folder: Path, seconds: float, stack: contextlib.ExitStack) -> str | None:
    """Lock a folder until `stack` is closed; return what prevents it, or None."""
    try:
        file = stack.enter_context((folder / ".lock").open("w"))
        if _wait_for_lock(file, seconds, folder):
            return None
        return f"another job trains in {folder}: give another, or end it"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            warnings.warn(f"no lock keeps a second job out of {folder}: {error}", stacklevel=3)
            return None
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # The file system has no locks.
            return None
        return f"the run's folder cannot be written: {error}"


def _wait_for_lock(file: IO[str], seconds: float, folder: Path) -> bool:
    """Lock an open file; return whether that succeeded within this many seconds."""
    deadline, announced = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            if not announced:
                print_note(f"another job holds {folder}: waiting up to {seconds:.0f} s for it to end")
                announced = True
            time.sleep(0.2)


def load_corpus(config: TrainConfig) -> Corpus:
    """Load the tokenised data; the first rank of each machine tokenises it if necessary. Collective.

    Args:
        config: the run's options.

    Returns:
        The corpus on this rank's machine.

    Raises:
        ValueError: on every rank, if the data cannot be read, does not fit the options, or differs between machines.
    """
    corpus, problem = None, None
    # The other ranks wait for as long as tokenising takes.
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
                allow_binary=config.allow_binary,
            )
            problem = _describe_misfit(corpus, config)
            count_tokens(corpus.train)  # Once a machine; the other ranks, and later starts, read the result.
        except (ValueError, OSError) as error:
            problem = str(error)
    by_rank = patience.gather((corpus, problem), "tokenise the data, or read its index")
    if problem := next((p for _, p in by_rank if p), None):
        raise ValueError(problem)
    corpora = [c for c, _ in by_rank if c is not None]
    if len({tuple(shard.sha256 for shard in c.index.shards) for c in corpora}) > 1:
        raise ValueError("the machines' data differ: --data must name the same files, with the same content, on each")
    # The corpus of this rank's machine. Files may have changed since, so it is not opened again.
    return next(c for c, _ in reversed(by_rank[: _rank() + 1]) if c is not None)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


_FREE_OPTIONS = {
    *("data", "corpus", "cache", "run_folder", "ranks", "rows_a_rank", "device", "parallel", "timeout", "io_timeout"),
    *("profile", "wandb", "peak_tflops", "keep_checkpoints", "keep_every", "checkpoint_every", "async_checkpoints"),
    *("validate_every", "strategy", "keep_kv", "hardware", "init_from"),
}
"""Options that may change between starts of one run without a message."""
_PARAMETER_OPTIONS = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"),
    *("tie_embeddings", "qk_norm", "sub_layernorm", "multiway"),
)
"""Options of the model that decide the shapes of its parameters, and position, if it is t5."""


def describe_changes(before: dict[str, Any], now: dict[str, Any], path: Path) -> list[str]:
    """Describe how a run's options differ from those that a checkpoint was written with.

    Args:
        before: the options in the checkpoint.
        now: the options of this run.
        path: the checkpoint.

    Returns:
        A sentence for each difference that changes what the run learns.

    Raises:
        ValueError: if the checkpoint's parameters are those of another model.
    """
    if (objective := before.get("objective", "causal")) != now["objective"]:
        raise ValueError(
            f"{path} is of the objective {objective}, and this run's is {now['objective']}; use another run folder"
        )
    # An earlier version's checkpoint lacks newer options, which then have their defaults.
    saved = LongNetConfig(**before["model"])
    before = before | {"model": json.loads(json.dumps(dataclasses.asdict(saved)))}
    differing = [name for name in _PARAMETER_OPTIONS if before["model"][name] != now["model"][name]]
    if "t5" in (positions := {before["model"]["position"], now["model"]["position"]}) and len(positions) > 1:
        differing.append("position")
    if differing:
        pairs = ", ".join(f"{name} {before['model'][name]} there, {now['model'][name]} here" for name in differing)
        raise ValueError(f"{path} is of another model: {pairs}; use its options, or another run folder")
    return [
        f"this does not continue the same run: {name} was {before[name]} and is {now[name]}"
        for name in sorted(set(before) & set(now) - _FREE_OPTIONS)
        if before[name] != now[name]
    ]


def num_token_ids(corpus: Corpus, config: TrainConfig) -> int:
    """Return the number of token ids that a model needs: those of the data, and the mask for the objective mlm."""
    return corpus.index.vocab_size + (config.objective == "mlm")


def _describe_misfit(corpus: Corpus, config: TrainConfig) -> str | None:
    """Return why a corpus cannot be trained on with these options, or None."""
    required, seq_len = num_token_ids(corpus, config), config.seq_len
    if BYTES_VOCABULARY != config.model.vocab_size < required:
        return (
            f"vocab_size is {config.model.vocab_size}, and the data's tokens ({corpus.index.tokenizer})"
            f"{' and the mask' * (config.objective == 'mlm')} need {required}: --model.vocab-size {required}"
        )
    if (config.model.multiway_first_id or 0) >= corpus.index.vocab_size:
        return (
            f"multiway_first_id is {config.model.multiway_first_id}, and the data's tokens ({corpus.index.tokenizer}) "
            f"have {corpus.index.vocab_size} ids: none would be of the second kind"
        )
    for name, stream in (("training", corpus.train), ("held-out", corpus.validation)):
        if stream.num_windows(seq_len) == 0:
            return (
                f"the {name} part of the data is {stream.stop - stream.start} tokens, and one sequence with the token "
                f"after it is {seq_len + 1}; give more data, a shorter seq_len, or another validation_fraction"
            )
    return None


def find_tokenizer(run: Path) -> Path | None:
    """Return the file of the tokenizer that made a run's tokens; None for bytes.

    Raises:
        ValueError: if the file is missing, or is another tokenizer now.
    """
    saved = json.loads((run / "config.json").read_text())
    name, path = saved.get("tokens_by", Bytes.name), saved.get("tokenizer")
    if name == Bytes.name:
        return None
    if path is None:  # The run read a folder of tokens, which holds a copy.
        path = Path(saved["data"][0]) / name.rpartition(" ")[0]
    if (found := load_tokenizer(path).name) != name:
        raise ValueError(f"{run} was trained on tokens by {name}, and {path} is {found} now")
    return Path(path)


def read_config(run: Path) -> TrainConfig:
    """Read the options of a run from its config.json; options that it does not name have their defaults.

    Args:
        run: the run folder.

    Raises:
        ValueError: if the folder is not that of a run, or its options cannot be read or are unknown.
    """
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} holds no config.json; give the folder of a run")
    try:
        saved = json.loads(path.read_text())
        options = {f.name: saved[f.name] for f in dataclasses.fields(TrainConfig) if f.name in saved}
        for name, kind in (("model", LongNetConfig), ("parallel", ParallelConfig)):
            parts = dict(saved.get(name, {}))
            if unknown := sorted(parts.keys() - {f.name for f in dataclasses.fields(kind)}):
                raise ValueError(f"{name} has unknown options: {', '.join(unknown)}; another version may know them")
            options[name] = kind(**parts)
        return TrainConfig(**options)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the options of a run: {error}") from None
