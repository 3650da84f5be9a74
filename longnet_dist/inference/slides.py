"""Embed whole slides from files of tile features."""

from __future__ import annotations

import os
import pickle
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from longnet_dist.distributed.collectives import gather_objects
from longnet_dist.extras import extra
from longnet_dist.models.slide_encoder import SlideEncoder

ENDINGS = (".h5", ".pt", ".npz")
_FEATURES = ("features", "tile_embeds")
"""The names that tools give to the features of tiles."""


def find_tile_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of tile features that are named, or lie in the folders that are named.

    Args:
        paths: files, or folders of files that end in .h5, .pt or .npz.

    Raises:
        ValueError: if there is none, or two files of one name, whose results would have one name.
        FileNotFoundError: if a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        files += sorted(x for x in path.iterdir() if x.suffix in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there is no file that ends in {', '.join(ENDINGS)}; name files of tile features, or folders")
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(file.stem, file)) is not file:
            raise ValueError(f"{other} and {file} would both become {file.stem}.npz; embed them into two folders")
    return files


def read_tiles(path: Path) -> tuple[Tensor, Tensor]:
    """Read the features of a slide's tiles, and their coordinates.

    Args:
        path: an .h5, .pt or .npz file with `features` (or `tile_embeds`), (N, E), and `coords`, (N, 2), in pixels. A
            leading dimension of 1 is dropped.

    Returns:
        features, (N, E), float32, and coords, (N, 2).

    Raises:
        ValueError: if the file cannot be read, lacks one of both, has a wrong shape, or features that are not finite.
    """
    arrays = _read_arrays(path)
    name = next((name for name in _FEATURES if name in arrays), None)
    if name is None or "coords" not in arrays:
        raise ValueError(f"it has {', '.join(arrays) or 'nothing'}; it must have features and coords")
    features, coords = (_as_numbers(name, arrays[name]) for name in (name, "coords"))
    features, coords = (x[0] if x.dim() == 3 and len(x) == 1 else x for x in (features, coords))
    if features.dim() != 2 or not len(features) or coords.shape != (len(features), 2):
        raise ValueError(
            f"features is {tuple(features.shape)} and coords {tuple(coords.shape)}; they must be (N, E) and (N, 2) "
            "of one tile or more"
        )
    if not features.isfinite().all():
        raise ValueError("features has values that are not finite")
    return features.float(), coords


@torch.no_grad()
def embed_slides(
    model: SlideEncoder,
    files: Iterable[Path],
    out: Path,
    all_layers: bool = False,
    group: ProcessGroup | None = None,
) -> list[Path]:
    """Embed each slide into `out`/NAME.npz, and print its progress; a slide that cannot be embedded is named on stderr.

    With a group, its ranks share each slide: the call is collective, and its first rank writes and prints.

    Args:
        model: the slide encoder, in eval mode.
        files: the files of tiles; see `read_tiles`. Every rank reads them.
        out: the folder to write into; created if it is missing.
        all_layers: whether to write `layers`, (num_layers + 1, E), too, beside `embedding`, (E,).
        group: the ranks that share each slide; None for this process alone.

    Returns:
        The files that failed.

    Raises:
        RuntimeError: with a group, if a rank fails while it computes, or is gone.
    """
    out.mkdir(parents=True, exist_ok=True)
    files, failed = list(files), []
    is_first = group is None or dist.get_rank(group) == 0
    tolerated = (ValueError, OSError, RuntimeError, MemoryError) if group is None else (ValueError, OSError)
    for number, file in enumerate(files, 1):
        start = time.perf_counter()
        try:
            num_tiles, results = _embed(model, file, all_layers, group)
            if is_first:
                _write(out / f"{file.stem}.npz", results)
        except tolerated as error:
            failed.append(file)
            if is_first:
                print(f"[{number}/{len(files)}] {file} failed: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        else:
            if is_first:
                seconds = time.perf_counter() - start
                print(f"[{number}/{len(files)}] {file}: {num_tiles:,} tiles in {seconds:.1f} s", flush=True)
    return failed


def _embed(
    model: SlideEncoder, file: Path, all_layers: bool, group: ProcessGroup | None
) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of tiles of a slide, and its embeddings. Collective over the group."""
    tiles, problem = None, None
    try:
        tiles = read_tiles(file)
        if tiles[0].shape[1] != model.encoder.input_dim:
            problem = f"features have {tiles[0].shape[1]} values, and these weights need {model.encoder.input_dim}"
    except (ValueError, OSError) as error:
        problem = str(error)
    # A slide that one rank cannot read must not leave the others waiting for it.
    problems = gather_objects(problem, group) if group is not None else [problem]
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)
    assert tiles is not None
    num_tiles, weight = len(tiles[0]), model.norm.weight
    mesh = None if group is None else model.make_mesh(group, num_tiles)
    # Copies, so that a rank keeps no rows of others.
    rows = [x[None] if mesh is None else model.encoder.split(x[None], mesh).clone() for x in tiles]
    del tiles
    features, coords = rows.pop(0).to(weight.device, weight.dtype), rows.pop(0).to(weight.device)
    if not all_layers:
        return num_tiles, {"embedding": model(features, coords, mesh=mesh)[0].float().cpu().numpy()}
    embedding, layers = model.with_layers(features, coords, mesh=mesh)
    return num_tiles, {
        "embedding": embedding[0].float().cpu().numpy(),
        "layers": torch.cat(layers).float().cpu().numpy(),
    }


def _write(path: Path, results: Mapping[str, np.ndarray]) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            np.savez(stream, **results)  # type: ignore[arg-type]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_numbers(name: str, values: Any) -> Tensor:
    try:
        if isinstance(values, np.ndarray):  # HDF5 files may have the byte order of another machine.
            values = values.astype(values.dtype.newbyteorder("="), copy=False)
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.is_complex():
        raise ValueError(f"{name} is no array of numbers")
    return numbers


def _read_arrays(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".h5":
            with extra("slides", path):
                import h5py
            with h5py.File(path) as file:
                found = {name: file[name] for name in (*_FEATURES, "coords") if name in file}
                return {name: x[()] for name, x in found.items() if isinstance(x, h5py.Dataset)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            return content if isinstance(content, dict) else {"features alone": content}
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"it cannot be read: {str(error).partition(chr(10))[0]}") from None
    raise ValueError(f"its name must end in {', '.join(ENDINGS)}")
