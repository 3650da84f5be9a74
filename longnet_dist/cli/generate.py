"""`longnet-dist generate`: the continuation of a text by a model."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import Run, check_positive


def run_generate(
    run: Run,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print how a model continues a text, as it comes, from caches that do not grow with the text.

    Under torchrun, all ranks read the prompt together.

    Args:
        run: Folder of the run, or its URL in an object store; or of an export.
        prompt: The text.
        prompt_file: File of the text, of any length.
        max_new_tokens: The most tokens to add; an end of the document ends it before.
        temperature: The divisor of the logits; with 0, the likeliest token is taken.
        top_k: Draw from this many likeliest tokens.
        top_p: Draw from the likeliest tokens whose probabilities sum up to at least this.
        seed: The seed of the draws.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the text to continue, by --prompt or --prompt-file")
    check_positive({"max-new-tokens": max_new_tokens} | ({} if top_k is None else {"top-k": top_k}))
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"--seed is {seed}; it must be 0 or more, and below 2^63")
    if prompt_file is not None and not prompt_file.is_file():
        raise ValueError(f"--prompt-file {prompt_file} is no file")
    import torch
    import torch.distributed as dist

    from longnet_dist.distributed.mesh import SequenceMesh
    from longnet_dist.inference.stream import Progress
    from longnet_dist.training.evaluation import evaluated, tokenizer_of

    text = prompt_file.read_bytes() if prompt_file is not None else str(prompt).encode()
    folder = storage_path(run)
    with evaluated(folder) as (model, _, mesh_of_run):
        tokenizer = tokenizer_of(folder, model)
        ids = torch.from_numpy(tokenizer.encode([text])[0].astype("int64"))[None]
        if not ids.shape[1]:
            raise ValueError("the text to continue is empty; it needs at least one token")
        ids = ids.to(model.output.weight.device)
        mesh = mesh_of_run and SequenceMesh(dist.group.WORLD, model.config.pattern, ids.shape[1])
        progress = Progress(ids.shape[1]) if mesh is None or mesh.rank == 0 else None
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        drawn: list[int] = []
        written, characters = 0, codecs.getincrementaldecoder("utf-8")("replace")
        for token in model.stream(ids, max_new_tokens, mesh=mesh, progress=progress, **options):
            if token.item() == tokenizer.end_of_document:
                break
            drawn.append(int(token.item()))
            # A character may be several tokens, so all of them are decoded again.
            continuation = tokenizer.decode(drawn)
            if progress is not None and not continuation.endswith("\N{REPLACEMENT CHARACTER}".encode()):
                print(characters.decode(continuation[written:]), end="", flush=True)
                written = len(continuation)
        if progress is not None:
            print(characters.decode(tokenizer.decode(drawn)[written:], final=True))
