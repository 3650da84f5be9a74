"""The command `longnet-dist` and its subcommands. Options are read from types and docstrings by tyro."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longnet_dist.best_effort import tolerate_broken_output
from longnet_dist.checkpoints.checkpoints import CheckpointError
from longnet_dist.checkpoints.storage import place
from longnet_dist.extras import extra
from longnet_dist.paths import local_path
from longnet_dist.plan.pattern import Pattern
from longnet_dist.training.config import RayConfig, TrainConfig
from longnet_dist.training.trainer import train

_LISTS = ("--data", "--edges", "--ray.labels", "--ray.resources")
"""Options of any number of values, for which none would otherwise count as not given."""
_MAY_BE_EMPTY = ("--wandb",)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 where its arguments cannot work, 1 where checkpoints fail, with the reason in one line."""
    app = tyro.extras.SubcommandApp()
    app.command(name="train")(_train)
    app.command(name="tokenize")(_tokenize)
    app.command(name="eval")(_eval)
    app.command(name="export")(_export)
    app.command(name="report")(_report)
    app.command(name="draw")(_draw)
    app.command(name="plan")(_plan)
    app.command(name="doctor")(_doctor)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _check_values(arguments)
        app.cli(prog="longnet-dist", args=arguments, config=(tyro.conf.CascadeSubcommandArgs,), registry=_registry())
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, _PathError) as error:
        print(f"longnet-dist: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"longnet-dist: {error}", file=sys.stderr)
        return 1
    return 0


def _check_values(arguments: Sequence[str]) -> None:
    """See that no value is empty or left out, as an unset variable of a script makes it."""
    option = ""
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            if option.replace("_", "-") in _LISTS and not equals and following.startswith("--"):
                raise ValueError(f"{option} is given no value; give one, or leave the option out")
        if (not argument or (argument.startswith("--") and equals and not value)) and option not in _MAY_BE_EMPTY:
            raise ValueError(
                f"{option} is empty; give a value, or leave the option out"
                if option
                else f"an argument of {arguments[0] or 'longnet-dist'} is empty"
            )


class _PathError(Exception):
    """A ValueError that tyro does not put in a frame."""


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Every option of the type Path is a path on this machine, with `~` expanded; see `local_path`."""
    registry = tyro.constructors.ConstructorRegistry()

    def read(given: list[str]) -> Path:
        try:
            return local_path(given[0])
        except ValueError as error:
            raise _PathError(str(error)) from None

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=read,
            is_instance=lambda x: isinstance(x, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    launcher: Literal["none", "ray"] = "none",
    ranks: int = 1,
    ray: RayConfig = RayConfig(),  # noqa: B008
) -> None:
    """Train a LongNet on text or code: alone, under torchrun over all its ranks, or on a cluster of Ray.

    torchrun --nproc-per-node 2 -m longnet_dist train --seq-len 32768 --data src/
    longnet-dist train --launcher ray --ranks 8 --run-folder /shared/run --data /shared/src/

    Args:
        config: The options of the run.
        launcher: Who starts the ranks: none (this process, or whoever set WORLD_SIZE), or Ray.
        ranks: How many, where Ray starts them.
        ray: How Ray runs them.
    """
    if launcher == "none":
        if str(ranks) not in ("1", os.environ.get("WORLD_SIZE")):
            raise ValueError(
                f"--ranks is {ranks}, and nothing starts them: give --launcher ray, or start them without --ranks, by "
                "torchrun --nproc-per-node RANKS -m longnet_dist train"
            )
        if ray != RayConfig():
            raise ValueError("--ray.* options need --launcher ray")
        with tolerate_broken_output():
            train(config)
        return
    with extra("ray", "--launcher ray"):
        from longnet_dist.integrations.ray import train_on_ray
    train_on_ray(config, ranks, ray)


def _tokenize(
    data: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    tokenizer: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
    shard_tokens: int = 1 << 27,
) -> None:
    """Tokenise data into a folder of memory-mapped shards, for `longnet-dist train --data FOLDER`.

    Stopped at any moment, the same command goes on from the last whole shard.

    Args:
        data: Files, folders, globs and hf: datasets, as for train.
        out: The folder.
        tokenizer: A tokenizer's file, *.json (tokenizers) or *.tiktoken; bytes by default.
        text_field: The key or column that holds the text of a row of JSON lines or Parquet.
        seed: Of the order of files.
        shard_tokens: Tokens a shard, about.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from longnet_dist.data.corpus import num_bytes, tokenize
    from longnet_dist.data.shards import read_index

    _check_positive({"shard-tokens": shard_tokens})
    if not data:
        raise ValueError("no data to tokenise; give files, folders, globs or hf: datasets")
    columns = (TextColumn("tokenise"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("tokenise", total=num_bytes(data) or None)
        tokenize(
            data,
            out,
            out,
            tokenizer=tokenizer,
            text_field=text_field,
            seed=seed,
            shard_tokens=shard_tokens,
            progress=lambda done: progress.update(task, completed=done),
        )
        # What surrounds the text in a file is none of it.
        progress.update(task, total=progress.tasks[0].completed)
    index = read_index(out)
    print(
        f"{out}: {index.num_tokens:,} tokens of {sum(s.documents for s in index.shards):,} documents in "
        f"{len(index.shards)} shards; train --data {out} --model.vocab-size {index.vocab_size}"
    )


def _eval(
    run: tyro.conf.Positional[str],
    data: tuple[str, ...] = (),
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    sequences: int = 8,
    edges: tuple[int, ...] = (256, 1024, 2048, 4096, 8192, 16384, 32768),
) -> None:
    """Say how many bits a byte a run's model needs on held-out data, by how much context a token has.

    Args:
        run: The run's folder, or its place in a store.
        data: Files, folders and globs; what the run held out by default.
        tokenizer: Of the data; the run's by default.
        seq_len: Tokens a sequence; the run's by default.
        sequences: How many sequences, at most.
        edges: Where one bucket of positions ends and the next begins.
    """
    import torch

    from longnet_dist.data.corpus import open_corpus
    from longnet_dist.inference.evaluate import bits_by_position
    from longnet_dist.training.job import corpus_of, read_config
    from longnet_dist.training.state import load_model

    _check_positive({"sequences": sequences} | ({} if seq_len is None else {"seq-len": seq_len}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, model = read_config(place(run)), load_model(run).to(device).eval()
    if data:
        held_out = open_corpus(
            data,
            config.cache,
            0.0,
            tokenizer=tokenizer or config.tokenizer,
            text_field=config.text_field,
            seed=config.seed,
        ).train
    else:
        held_out = corpus_of(config).validation
    trained_on = json.loads((place(run) / "config.json").read_text()).get("tokens_by", "bytes")
    if held_out.index.tokenizer != trained_on:
        raise ValueError(
            f"the run's tokens are by {trained_on}, and the data's by {held_out.index.tokenizer}: give that --tokenizer"
        )
    print(f"{'context':>17}  bits per byte  perplexity of a byte")
    for first, last, bits in bits_by_position(model, held_out, seq_len or config.seq_len, sequences, edges):
        print(f"{first:>7} to {last:>6}  {bits:13.3f}  {2**bits:.3f}")


def _export(run: tyro.conf.Positional[str], folder: tyro.conf.Positional[Path]) -> None:
    """Write a run's model as safetensors and config.json, for LongNet.from_pretrained(folder).

    Args:
        run: The run's folder, or its place in a store.
        folder: Where to write.
    """
    from longnet_dist.training.state import load_model

    load_model(run).save_pretrained(folder)
    print(folder)


def _report(runs: tyro.conf.Positional[tuple[str, ...]], out: Path = Path("report.png")) -> None:
    """Draw the curves of one or several runs into one picture or page.

    Args:
        runs: The runs' folders, or places in a store.
        out: A picture (PNG, SVG or PDF) or a page (HTML), by its ending.
    """
    from longnet_dist.cli.report import report

    print(report(out, [place(run) for run in runs]))


def _draw(
    out: Path = Path("pattern.png"),
    segment_lengths: tuple[int, ...] = (16, 32, 64),
    dilation_rates: tuple[int, ...] = (1, 2, 4),
    head_phases: Literal["interleaved", "blocked"] = "interleaved",
    seq_len: int = 64,
    heads: int = 4,
    ranks: int = 1,
    causal: bool = True,
) -> None:
    """Draw a pattern: who sees whom, by head phase, and where rank boundaries cut it.

    Args:
        out: The picture, a PNG, SVG or PDF by its ending.
        segment_lengths: Segment lengths of the branches, in tokens.
        dilation_rates: Dilation rates of the branches.
        head_phases: Which rows each head keeps.
        seq_len: Tokens.
        heads: Key/value heads.
        ranks: Ranks over which the sequence is split.
        causal: Whether a query sees only keys at or before it.
    """
    from longnet_dist.cli.draw import draw_pattern

    _check_positive({"seq-len": seq_len, "ranks": ranks, "heads": heads})
    pattern = Pattern(segment_lengths, dilation_rates, head_phases)
    print(draw_pattern(out, pattern, seq_len, heads, ranks, causal))


def _plan(
    segment_lengths: tuple[int, ...] = (2048, 8192, 32768),
    dilation_rates: tuple[int, ...] = (1, 4, 16),
    seq_len: int = 32768,
    ranks: int = 4,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    element_size: int = 2,
    keep_kv: bool = False,
    causal: bool = True,
) -> None:
    """Say what a layer of attention costs each rank: rows, bytes received, floating point operations.

    Args:
        segment_lengths: Segment lengths of the branches, in tokens.
        dilation_rates: Dilation rates of the branches.
        seq_len: Tokens of the whole sequence.
        ranks: Ranks over which it is split.
        heads: Query heads.
        kv_heads: Key/value heads; as many as heads by default.
        head_dim: Dimensions a head.
        element_size: Bytes a number: 2 for bfloat16, 4 for float32. Gradients travel in 4 at least.
        keep_kv: Whether gathered keys and values are kept for the backward, or gathered again.
        causal: Whether a query sees only keys at or before it.
    """
    from longnet_dist.plan.cost import attention_flops, bytes_received
    from longnet_dist.plan.shard import Shard, choose_chunk

    sizes = {"seq-len": seq_len, "ranks": ranks, "heads": heads, "head-dim": head_dim, "element-size": element_size}
    _check_positive(sizes | {"kv-heads": kv_heads or heads})
    if heads % (kv_heads or heads):
        raise ValueError(f"--kv-heads is {kv_heads}; it must divide --heads {heads}")
    pattern = Pattern(segment_lengths, dilation_rates)
    chunk = choose_chunk(pattern, seq_len, ranks)
    shard = Shard(seq_len, chunk, 0, ranks)
    received = bytes_received(pattern, shard, kv_heads or heads, head_dim, element_size, keep_kv)
    print(f"{ranks} ranks of {chunk} rows (the last {shard.of(ranks - 1).num_rows}); a layer, forward and backward:")
    for branch, count in zip(pattern.branches, received, strict=True):
        where = "within the chunk" if count == 0 else f"{count:,} bytes received by a rank"
        print(f"  branch {branch}: {where}")
    flops = attention_flops(pattern, seq_len, heads, head_dim, causal, kv_heads)
    print(f"  in all {sum(received):,} bytes a rank; {flops:.3g} floating point operations forward, over all ranks")


def _check_positive(options: dict[str, int]) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")


def _doctor(cluster: bool = False, timeout: float = 30.0) -> None:
    """Say what this machine has, which kernels and backends work here, and why the others do not.

    Args:
        cluster: Look at the cluster of Ray that RAY_ADDRESS names instead: its nodes, and whether and how fast every
            two of them reach each other. Exits with 1 where something is wrong.
        timeout: Seconds that an answer from a node may take.
    """
    if cluster:
        with extra("ray", "--cluster"):
            from longnet_dist.integrations.ray.doctor import diagnose_cluster
        report, wrong = diagnose_cluster(timeout)
        print(report)
        if wrong:
            raise SystemExit(1)
        return
    from longnet_dist.cli.doctor import diagnose

    print(diagnose())


if __name__ == "__main__":
    sys.exit(main())
