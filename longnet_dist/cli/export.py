"""`longnet-dist export`: the model of a run as safetensors, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.cli.options import Run


def run_export(run: Run, folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]) -> None:
    """Write a run's model as safetensors, with config.json and its tokenizer, for LongNet.from_pretrained(folder).

    Args:
        run: Folder of the run, or its URL in an object store.
        folder: Folder to write to.
    """
    from longnet_dist.training.job import find_tokenizer
    from longnet_dist.training.state import load_model

    load_model(run).save_pretrained(folder, find_tokenizer(storage_path(run)))
    print(folder)
