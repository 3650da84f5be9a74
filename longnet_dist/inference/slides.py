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
from torch import Tensor

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
    features, coords = torch.as_tensor(arrays[name]), torch.as_tensor(arrays["coords"])
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
def embed_slides(model: SlideEncoder, files: Iterable[Path], out: Path, all_layers: bool = False) -> list[Path]:
    """Embed each slide into `out`/NAME.npz, and print its progress; a slide that cannot be embedded is named on stderr.

    Args:
        model: the slide encoder, in eval mode.
        files: the files of tiles; see `read_tiles`.
        out: the folder to write into; created if it is missing.
        all_layers: whether to write `layers`, (num_layers + 1, E), too, beside `embedding`, (E,).

    Returns:
        The files that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    files, failed = list(files), []
    for number, file in enumerate(files, 1):
        start = time.perf_counter()
        try:
            num_tiles = _embed(model, file, out, all_layers)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed.append(file)
            print(f"[{number}/{len(files)}] {file} failed: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        else:
            print(
                f"[{number}/{len(files)}] {file}: {num_tiles:,} tiles in {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    return failed


def _embed(model: SlideEncoder, file: Path, out: Path, all_layers: bool) -> int:
    features, coords = read_tiles(file)
    if features.shape[1] != model.encoder.input_dim:
        raise ValueError(f"features have {features.shape[1]} values, and these weights need {model.encoder.input_dim}")
    weight = model.norm.weight
    inputs = features[None].to(weight.device, weight.dtype), coords[None].to(weight.device)
    results = {"embedding": model(*inputs)[0].float().cpu().numpy()}
    if all_layers:
        results["layers"] = torch.cat(model(*inputs, all_layers=True)).float().cpu().numpy()
    partial = out / f"{file.stem}.partial"
    try:
        with partial.open("wb") as stream:
            np.savez(stream, **results)
        os.replace(partial, out / f"{file.stem}.npz")
    finally:
        partial.unlink(missing_ok=True)
    return len(features)


def _read_arrays(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".h5":
            with extra("slides", path):
                import h5py
            with h5py.File(path) as file:
                return {name: file[name][()] for name in (*_FEATURES, "coords") if name in file}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            return content if isinstance(content, dict) else {"features alone": content}
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"it cannot be read: {str(error).partition(chr(10))[0]}") from None
    raise ValueError(f"its name must end in {', '.join(ENDINGS)}")
