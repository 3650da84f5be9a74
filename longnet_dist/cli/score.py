"""`longnet-dist score`, the log-likelihood of files, and `longnet-dist embed-slides`, embeddings of whole slides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longnet_dist.checkpoints.storage import storage_path


def run_score(
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")]],
    model: str,
    tokens: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
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
    from longnet_dist.training.evaluation import evaluated
    from longnet_dist.training.job import find_tokenizer
    from longnet_dist.training.state import is_export

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


def run_embed_slides(
    tiles: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TILES...")]],
    weights: str,
    out: Path,
    all_layers: bool = False,
    global_pool: bool = False,
    tile_size: int = 256,
    padding: Literal["torchscale", "none"] = "torchscale",
    device: str | None = None,
) -> None:
    """Embed whole slides with Prov-GigaPath's slide encoder.

    A slide that cannot be embedded is named, and the others are still embedded; the exit status is then 1. Under
    torchrun, all ranks share each slide.

    Args:
        tiles: Files of tile features (.h5, .pt, .npz), each one slide, or folders of them.
        weights: The file slide_encoder.pth, or hf_hub:OWNER/NAME.
        out: Folder for the results, one NAME.npz for each slide.
        all_layers: Write the embeddings of all layers, too.
        global_pool: Average over tiles, instead of reading the class token.
        tile_size: Side of a tile in pixels, in the unit of the coordinates.
        padding: Attention as the weights were trained (torchscale), or exact (none).
        device: Device of torch; by default a GPU if there is one, under torchrun one for each rank.
    """
    if tile_size < 1:
        raise ValueError(f"--tile-size is {tile_size}; it must be at least 1")
    import torch
    import torch.distributed as dist

    from longnet_dist.inference.slides import embed_slides, find_tile_files
    from longnet_dist.models.slide_encoder import SlideEncoder
    from longnet_dist.training.config import TrainConfig
    from longnet_dist.training.processes import init_processes

    files = find_tile_files(tiles)
    with init_processes(TrainConfig(), None if device is None else torch.device(device)) as chosen:
        # The weights were trained on slides of up to 1,024 x 1,024 tiles, which decides the segment lengths.
        model = SlideEncoder.from_pretrained(
            weights,
            device=chosen,
            slide_size=1024 * tile_size,
            tile_size=tile_size,
            global_pool=global_pool,
            padding=padding,
        )
        failed = embed_slides(model, files, out, all_layers, dist.group.WORLD if dist.is_initialized() else None)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(files)} slides failed: {', '.join(map(str, failed))}")
