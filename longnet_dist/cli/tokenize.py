"""`longnet-dist tokenize`: write data as shards of tokens, with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from longnet_dist.cli.options import check_positive


def run_tokenize(
    data: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")]],
    out: Path,
    tokenizer: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
    allow_binary: bool = False,
    shard_tokens: int = 1 << 27,
) -> None:
    """Tokenise data into a folder of memory-mapped shards, for `longnet-dist train --data FOLDER`.

    After an interruption, run the same command again: it goes on from at most a minute and a batch before.

    Args:
        data: Files, folders, globs and hf: datasets, as for train.
        out: Folder for the shards.
        tokenizer: Tokenizer file, *.json (tokenizers) or *.tiktoken; by default a token is a byte.
        text_field: Key or column that holds the text in a row of JSON lines or Parquet.
        seed: Seed for the order of the files.
        allow_binary: Also take files that hold NUL bytes, which text does not have.
        shard_tokens: Approximate number of tokens per shard.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from longnet_dist.data.corpus import num_bytes, tokenize
    from longnet_dist.data.shards import INDEX, holds_tokens, read_index
    from longnet_dist.training.config import MAX_SEED

    check_positive({"shard-tokens": shard_tokens})
    if abs(seed) > MAX_SEED:
        raise ValueError(f"--seed is {seed}; it must be at most {MAX_SEED} (2^40) in magnitude")
    if not data:
        raise ValueError("no data to tokenise; give files, folders, globs or hf: datasets")
    if holds_tokens(out) and (out / INDEX).is_file():
        print(f"{out} already holds all tokens; checking that they are of this data")
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
            allow_binary=allow_binary,
            shard_tokens=shard_tokens,
            progress=lambda done: progress.update(task, completed=done),
        )
        # The total was the size of the files, which hold more than text.
        progress.update(task, total=progress.tasks[0].completed)
    index = read_index(out)
    print(
        f"{out}: {index.num_tokens:,} tokens of {sum(s.documents for s in index.shards):,} documents in "
        f"{len(index.shards)} shards; train with --data {out}"
    )
