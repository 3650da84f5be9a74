"""`longnet-dist eval`: bits per byte on held-out data, by position."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import Run, check_positive


def run_eval(
    run: Run,
    data: tuple[str, ...] = (),
    tokenizer: Path | None = None,
    seq_len: int | None = None,
    sequences: int = 8,
    edges: tuple[int, ...] = (256, 1024, 2048, 4096, 8192, 16384, 32768),
) -> None:
    """Print a run's bits per byte on held-out data, by the number of tokens before the predicted one.

    Args:
        run: Folder of the run, or its URL in an object store.
        data: Files, folders, globs and hf: datasets, as for train; by default the run's own held-out data.
        tokenizer: Tokenizer file for the data; by default that of the run.
        seq_len: Tokens per sequence; by default that of the run.
        sequences: Largest number of sequences to evaluate.
        edges: Positions in the sequence at which one row of the table ends and the next begins.
    """
    import torch

    from longnet_dist.data.corpus import open_corpus
    from longnet_dist.inference.evaluate import bits_by_position
    from longnet_dist.training.job import load_corpus, read_config
    from longnet_dist.training.state import load_model

    check_positive({"sequences": sequences} | ({} if seq_len is None else {"seq-len": seq_len}))
    for edge in edges:
        check_positive({"edges": edge})
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"--edges are {' '.join(map(str, edges))}; each must be above the one before")
    if tokenizer is not None and not data:
        raise ValueError("--tokenizer is for --data; the data that the run held out has the run's own tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, model = read_config(storage_path(run)), load_model(run).to(device).eval()
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
        held_out = load_corpus(config).validation
    run_tokenizer = json.loads((storage_path(run) / "config.json").read_text()).get("tokens_by", "bytes")
    if held_out.index.tokenizer != run_tokenizer:
        raise ValueError(
            f"the run's tokens are by {run_tokenizer}, but the data's are by {held_out.index.tokenizer}: give the "
            "run's tokenizer with --tokenizer"
        )
    print(f"{'context':>17}  bits per byte  perplexity per byte")
    for first, last, bits in bits_by_position(model, held_out, seq_len or config.seq_len, sequences, edges):
        print(f"{first:>7} to {last:>6}  {bits:13.3f}  {2**bits:19.3f}")
