"""`longnet-dist score`, `embed` and `eval`: log-likelihoods and embeddings of files, and bits per byte by position."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import Run, check_positive

if TYPE_CHECKING:
    from longnet_dist.data.tokenizers import Tokenizer
    from longnet_dist.distributed.mesh import SequenceMesh
    from longnet_dist.inference.stream import Reading, Tokens
    from longnet_dist.models.decoder import LongNet


def run_score(
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")]],
    model: str,
    tokens: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    state: Path | None = None,
) -> None:
    """Print how likely a model finds files: log-likelihood, and bits per byte.

    Each file is one sequence, of any length: one process reads it part by part in constant memory, unless --tokens is
    given. Under torchrun, all ranks share it.

    Args:
        files: Files to score.
        model: Folder of an export or of a run; a run may be in an object store.
        tokens: Print the log-likelihood of each token, too, one per line, in nats.
        as_json: Print one JSON object per file.
        state: For one file, a file in which the state is saved every minute, so that the same command goes on after a
            kill. It is read part by part then, under torchrun too.
    """
    _check_files(files, "score")
    if state is not None and (tokens or len(files) > 1):
        raise ValueError("--state is for one file, without --tokens")
    import torch
    import torch.distributed as dist

    from longnet_dist.data.tokenizers import Bytes
    from longnet_dist.distributed.mesh import SequenceMesh
    from longnet_dist.inference.stream import can_stream, nats_by_position
    from longnet_dist.training.evaluation import evaluated, tokenizer_of

    with evaluated(storage_path(model)) as (loaded, _, mesh_of_run):
        tokenizer = tokenizer_of(storage_path(model), loaded)
        if state is not None:
            _check_streams("--state", loaded)
        streams = mesh_of_run is None and not tokens and tokenizer.name == Bytes.name and can_stream(loaded)
        for file in files:
            if streams or state is not None:
                source, num_bytes = _tokens_of(file, tokenizer)
                reading = _reading(model, file, state, mesh_of_run, len(source))
                ((_, count, nats),) = nats_by_position(loaded, source, reading=reading)
                if reading.progress is not None:
                    _print(file, -nats, count, num_bytes, as_json)
                continue
            text = file.read_bytes()
            ids = torch.from_numpy(tokenizer.encode([text])[0].astype("int64"))
            if len(ids) < 2:
                raise ValueError(f"{file} has {len(ids)} tokens; the first is not predicted, so it needs 2 or more")
            mesh = mesh_of_run and SequenceMesh(dist.group.WORLD, loaded.config.pattern, len(ids))
            scores = loaded.score(ids, mesh)
            if mesh is None or mesh.rank == 0:
                each = scores.tolist()
                _print(file, math.fsum(each), len(each), len(text), as_json, each if tokens else None)


def _print(
    file: Path, total: float, count: int, num_bytes: int, as_json: bool, scores: list[float] | None = None
) -> None:
    bits = -total / math.log(2) / num_bytes
    if as_json:
        result = {"file": str(file), "log_likelihood": total, "tokens": count, "bits_per_byte": bits}
        print(json.dumps(result | ({} if scores is None else {"log_likelihoods": scores})))
        return
    print(
        f"{file}: log-likelihood {total:,.1f} nats over {count:,} tokens, {total / count:.4f} per token; {bits:.4f} "
        "bits per byte"
    )
    if scores is not None:
        print("\n".join(f"{score:.6f}" for score in scores))


def run_embed(
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")]],
    model: str,
    out: Path,
    pooling: Literal["mean", "last"] = "mean",
) -> None:
    """Write the embeddings of files by a model: its features after the final norm, pooled.

    Each file is one sequence, of any length, which is read part by part in constant memory; under torchrun by all
    ranks together. The state is saved every minute, so that the same command goes on after a kill. A file whose result
    exists is skipped.

    Args:
        files: Files to embed.
        model: Folder of an export or of a run; a run may be in an object store.
        out: Folder for the results, one NAME.npy for each file: (d_model,), float32.
        pooling: The mean over all tokens, or the features of the last one.
    """
    _check_files(files, "embed")
    names: dict[str, Path] = {}
    for file in files:
        if (other := names.setdefault(file.name, file)) is not file:
            raise ValueError(f"{other} and {file} would both become {file.name}.npy; embed them into two folders")
    import numpy as np
    import torch

    from longnet_dist.inference.stream import embedding_of_stream
    from longnet_dist.training.evaluation import evaluated, tokenizer_of

    with evaluated(storage_path(model)) as (loaded, _, mesh):
        _check_streams("embed", loaded)
        tokenizer = tokenizer_of(storage_path(model), loaded)
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            result = out / f"{file.name}.npy"
            source, _ = _tokens_of(file, tokenizer, at_least=1)
            reading = _reading(model, file, out / f"{file.name}.state", mesh, len(source))
            exists = torch.tensor(float(result.exists() and reading.progress is not None))
            if mesh is not None:  # The first rank decides for all, which may see a file at different moments.
                exists = mesh.sum(exists.to(loaded.output.weight.device))
            if exists:
                action = "exists; remove it to embed the file again"
            else:
                vector = embedding_of_stream(loaded, source, pooling, reading)
                action = "written"
                if reading.progress is not None:
                    new = result.with_name(f"{file.name}.new.npy")
                    np.save(new, vector.float().numpy())
                    new.replace(result)
            if reading.progress is not None:
                print(f"{result} {action}")


def _check_files(files: tuple[Path, ...], doing: str) -> None:
    if not files:
        raise ValueError(f"there is no file to {doing}; name one or more")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is no file")


def _check_streams(what: str, model: LongNet) -> None:
    from longnet_dist.inference.stream import can_stream

    if not can_stream(model):
        raise ValueError(f"{what} needs a model with rotary positions or biases, and no zero rows")


def _tokens_of(file: Path, tokenizer: Tokenizer, at_least: int = 2) -> tuple[Tokens, int]:
    """Return the tokens of a file, and its number of bytes."""
    from longnet_dist.data.tokenizers import Bytes
    from longnet_dist.inference.stream import FileBytes, Repeated

    source = FileBytes(file, at_least)
    if tokenizer.name == Bytes.name:
        return source, len(source)
    ids = tokenizer.encode([file.read_bytes()])[0]  # They are known when it has read the whole file.
    return Repeated(ids, len(ids)), len(source)


def _reading(model: str, file: Path, state: Path | None, mesh: SequenceMesh | None, num_tokens: int) -> Reading:
    """Return how a file is read by these ranks; the first of them has the progress."""
    import torch.distributed as dist

    from longnet_dist.inference.stream import Progress, Reading

    identity = f"{model} on {file.resolve()} of {file.stat().st_mtime_ns}"
    progress = Progress(num_tokens) if mesh is None or mesh.rank == 0 else None
    return Reading(state, identity, group=None if mesh is None else dist.group.WORLD, progress=progress)


def run_eval(
    run: Run,
    data: tuple[str, ...] = (),
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    sequences: int = 8,
    edges: tuple[int, ...] = (256, 1024, 2048, 4096, 8192, 16384, 32768),
    stream: Path | None = None,
    state: Path | None = None,
) -> None:
    """Print a run's bits per byte on held-out data, by the number of tokens that the model has seen.

    Under torchrun, all ranks share each sequence, or each part of a stream.

    Args:
        run: Folder of the run, or its URL in an object store; or of an export, with --data.
        data: Files, folders, globs and hf: datasets, as for train; by default the run's own held-out data.
        tokenizer: Tokenizer file for the data; by default that of the run.
        seq_len: Tokens per sequence; by default that of the run.
        sequences: Largest number of sequences to evaluate.
        edges: Positions in the sequence at which one row of the table ends and the next begins.
        stream: File of any length to evaluate as one sequence, in constant memory, instead of other data.
        state: File in which --stream saves its state every minute, so that the same command goes on after a kill.
    """
    check_positive({"sequences": sequences} | ({} if seq_len is None else {"seq-len": seq_len}))
    for edge in edges:
        check_positive({"edges": edge})
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"--edges are {' '.join(map(str, edges))}; each must be above the one before")
    if tokenizer is not None and not data:
        raise ValueError("--tokenizer is for --data; the data that the run held out has the run's own tokenizer")
    if state is not None and stream is None:
        raise ValueError("--state is for --stream")
    if stream is not None:
        if data or seq_len is not None:
            raise ValueError("--stream FILE is the data, as one sequence; leave out --data and --seq-len")
        _evaluate_stream(run, stream, state, edges)
        return
    from longnet_dist.inference.evaluate import bits_by_position
    from longnet_dist.training.evaluation import evaluated, held_out_tokens

    with evaluated(storage_path(run), seq_len) as (model, config, mesh):
        held_out = held_out_tokens(storage_path(run), config, model, data, tokenizer)
        rows = bits_by_position(model, held_out, config.seq_len, sequences, edges, mesh)
    if mesh is not None and mesh.rank > 0:
        return
    reach = model.config.pattern.reach(config.seq_len)
    if reach < config.seq_len:
        print(f"a token of this model sees at most {reach:,} of the {config.seq_len:,} tokens")
    _print_rows(rows)


def _evaluate_stream(run: str, file: Path, state: Path | None, edges: tuple[int, ...]) -> None:
    """Print the table of a file that is read part by part."""
    from longnet_dist.inference.stream import nats_by_position
    from longnet_dist.training.evaluation import evaluated, tokenizer_of

    if not file.is_file():
        raise ValueError(f"--stream {file} is no file")
    with evaluated(storage_path(run)) as (model, _, mesh):
        _check_streams("--stream", model)
        source, num_bytes = _tokens_of(file, tokenizer_of(storage_path(run), model))
        reading = _reading(run, file, state, mesh, len(source))
        ranges = nats_by_position(model, source, edges, reading)
    if reading.progress is not None:
        scale = len(source) / num_bytes / math.log(2)
        _print_rows([(first, last, nats / (last - first) * scale) for first, last, nats in ranges])


def _print_rows(rows: list[tuple[int, int, float]]) -> None:
    print(f"{'tokens seen':>17}  bits per byte  perplexity per byte")
    for first, last, bits in rows:
        print(f"{first + 1:>7} to {last:>6}  {bits:13.3f}  {2**bits:19.3f}")
