"""The writer of this rank's files of a checkpoint."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from longnet_dist.best_effort import print_note
from longnet_dist.distributed import patience
from longnet_dist.distributed.patience import Patience
from longnet_dist.units import format_bytes


class PatientWriter(FileSystemWriter):
    """Writes a rank's files, and then tells the waiting ranks that they are written.

    Args:
        path: the folder to write into.
        waits: the means by which ranks wait for each other.
    """

    def __init__(self, path: Path, waits: Patience) -> None:
        super().__init__(path)
        self._patience = waits

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the data of this rank's plan."""
        with self._announced(sum(map(_num_bytes, plan.items))):
            result = super().write_data(plan, planner)
        self._patience.arrive()
        return result

    @contextlib.contextmanager
    def _announced(self, total: int) -> Iterator[None]:
        """Inside the context, print on rank 0 now and then how much of its files is written."""
        if self._patience.rank:
            yield
            return
        started, ended = time.monotonic(), threading.Event()

        def announce() -> None:
            while not ended.wait(patience.MESSAGE_SECONDS):
                written = 0
                with contextlib.suppress(OSError):  # The folder may be gone by now.
                    written = sum(path.stat().st_size for path in Path(self.path).glob("__0_*"))
                parts = f"{format_bytes(written)} of the {format_bytes(total)} that rank 0 writes"
                print_note(f"writing {self.path}: {parts} ({time.monotonic() - started:.0f} s)")

        thread = threading.Thread(target=announce, name="progress of a checkpoint", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(1.0)


def _num_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
