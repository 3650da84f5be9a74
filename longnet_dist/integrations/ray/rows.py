"""The rows of a gang's arrays: what a rank receives, or reads from a file that every node sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A rank's rows of an array: the rows themselves, or the file from which the rank reads them."""

    value: Tensor | Path
    """The rank's rows alone, or the path of the whole array."""
    dim: int = 0
    """The dimension that rows are counted in."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) along `dim`: of a .npy file, or of any other file's bytes."""
        if isinstance(self.value, Tensor):
            return self.value
        return copy_rows(map_file(self.value), start, stop, self.dim)


def map_file(path: Path) -> np.ndarray:
    """Map the array of a .npy file, or the bytes of any other file, into memory without reading it.

    Raises:
        ValueError: if the file cannot be read, or is not a whole .npy file of numbers.
    """
    try:
        if path.suffix != ".npy":
            # An empty file cannot be mapped.
            return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole .npy file of numbers: {error}") from None


def copy_rows(array: np.ndarray | Tensor, start: int, stop: int, dim: int) -> Tensor:
    """Copy the rows [start, stop) along `dim` into a tensor on the CPU.

    torch computes hardly anything with uint16, uint32 and uint64, so these become int64.

    Raises:
        ValueError: for a number in uint64 that int64 cannot hold.
    """
    rows = array[(slice(None),) * dim + (slice(start, stop),)]
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        if rows.dtype not in (torch.uint16, torch.uint32, torch.uint64):
            return rows.clone()
        rows = rows.numpy()
    dtype = rows.dtype.newbyteorder("=")
    if dtype.kind == "u" and dtype.itemsize > 1:
        largest, limit = int(rows.max(initial=0)), np.iinfo(np.int64).max
        if largest > limit:
            raise ValueError(
                f"an array of {dtype} holds {largest}; its numbers must be at most {limit}, int64's largest"
            )
        dtype = np.dtype(np.int64)
    return torch.from_numpy(np.array(rows, dtype, order="C"))
