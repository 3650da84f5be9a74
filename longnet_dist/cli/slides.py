"""`longnet-dist embed-slides`: embeddings of whole slides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def run_embed_slides(
    tiles: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TILES...")]],
    weights: str,
    out: Path,
    all_layers: bool = False,
    global_pool: bool = False,
    tile_size: int = 256,
    padding: Literal["torchscale", "none"] = "torchscale",
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
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
        dtype: Dtype in which the model computes; by default that of the weights. Results are in float32.
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
            dtype=None if dtype is None else getattr(torch, dtype),
            slide_size=1024 * tile_size,
            tile_size=tile_size,
            global_pool=global_pool,
            padding=padding,
        )
        failed = embed_slides(model, files, out, all_layers, dist.group.WORLD if dist.is_initialized() else None)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(files)} slides failed: {', '.join(map(str, failed))}")
