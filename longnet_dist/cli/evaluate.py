"""`longnet-dist eval`: bits per byte on held-out data, by position."""

from __future__ import annotations

import itertools
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
    """Print a run's bits per byte on held-out data, by the number of tokens that the model has seen.

    Under torchrun, all ranks share each sequence.

    Args:
        run: Folder of the run, or its URL in an object store; or of an export, with --data.
        data: Files, folders, globs and hf: datasets, as for train; by default the run's own held-out data.
        tokenizer: Tokenizer file for the data; by default that of the run.
        seq_len: Tokens per sequence; by default that of the run.
        sequences: Largest number of sequences to evaluate.
        edges: Positions in the sequence at which one row of the table ends and the next begins.
    """
    check_positive({"sequences": sequences} | ({} if seq_len is None else {"seq-len": seq_len}))
    for edge in edges:
        check_positive({"edges": edge})
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"--edges are {' '.join(map(str, edges))}; each must be above the one before")
    if tokenizer is not None and not data:
        raise ValueError("--tokenizer is for --data; the data that the run held out has the run's own tokenizer")
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
    print(f"{'tokens seen':>17}  bits per byte  perplexity per byte")
    for first, last, bits in rows:
        print(f"{first + 1:>7} to {last:>6}  {bits:13.3f}  {2**bits:19.3f}")
