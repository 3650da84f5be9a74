"""The writer of this rank's files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from longnet_dist.distributed.patience import Patience


class PatientWriter(FileSystemWriter):
    """Writes a rank's files, and then tells the waiting ranks that they are written.

    Args:
        path: the folder to write into.
        patience: the means by which ranks wait for each other.
    """

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the data of this rank's plan."""
        result = super().write_data(plan, planner)
        self._patience.arrive()
        return result
