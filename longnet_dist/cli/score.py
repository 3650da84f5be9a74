"""`longnet-dist score`: the log-likelihood of files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import tyro

from longnet_dist.checkpoints.storage import storage_path


def run_score(
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")]],
    model: str,
    tokens: bool = False,
    as_json: bool = False,
) -> None:
    """Print how likely a model finds files: log-likelihood, and bits per byte.

    Each file is one sequence. Under torchrun, all ranks share it.

    Args:
        files: Files to score.
        model: Folder of an export or of a run; a run may be in an object store.
        tokens: Print the log-likelihood of each token, too, one per line, in nats.
        as_json: Print one JSON object per file.
    """
    if not files:
        raise ValueError("there is no file to score; name one or more")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is no file")
    import torch
    import torch.distributed as dist

    from longnet_dist.data.tokenizers import load_tokenizer
    from longnet_dist.distributed.mesh import SequenceMesh
    from longnet_dist.training.evaluation import evaluated, is_export
    from longnet_dist.training.job import find_tokenizer

    with evaluated(storage_path(model)) as (loaded, _, mesh_of_run):
        folder = storage_path(model)
        tokenizer = load_tokenizer(loaded.tokenizer_file if is_export(folder) else find_tokenizer(folder))
        for file in files:
            text = file.read_bytes()
            ids = torch.from_numpy(tokenizer.encode([text])[0].astype("int64"))
            if len(ids) < 2:
                raise ValueError(f"{file} has {len(ids)} tokens; the first is not predicted, so it needs 2 or more")
            mesh = mesh_of_run and SequenceMesh(dist.group.WORLD, loaded.config.pattern, len(ids))
            scores = loaded.score(ids, mesh)
            if mesh is None or mesh.rank == 0:
                _print(file, scores.tolist(), len(text), tokens, as_json)


def _print(file: Path, scores: list[float], num_bytes: int, tokens: bool, as_json: bool) -> None:
    total = math.fsum(scores)
    bits = -total / math.log(2) / num_bytes
    if as_json:
        result = {"file": str(file), "log_likelihood": total, "tokens": len(scores), "bits_per_byte": bits}
        print(json.dumps(result | ({"log_likelihoods": scores} if tokens else {})))
        return
    print(
        f"{file}: log-likelihood {total:,.1f} nats over {len(scores):,} tokens, "
        f"{total / len(scores):.4f} per token; {bits:.4f} bits per byte"
    )
    if tokens:
        print("\n".join(f"{score:.6f}" for score in scores))
