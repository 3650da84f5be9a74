"""`longnet-dist train` with slow I/O on one rank: each of SLOW (separated by commas) takes SLOW_SECONDS once."""

import hashlib
import os
import sys
import time

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.utils.tensorboard import SummaryWriter

import longnet_dist.distributed.patience
from longnet_dist.checkpoints.storage import Disk
from longnet_dist.cli.app import main

SECONDS = float(os.environ.get("SLOW_SECONDS", 0))
PLACES = {
    "open": (SummaryWriter, "__init__", "0"),
    "metrics": (SummaryWriter, "add_scalar", "0"),
    "write": (FileSystemWriter, "write_data", "1"),
    "remove": (Disk, "remove", "0"),
    "hash": (hashlib, "file_digest", "1"),
    "read": (FileSystemReader, "read_data", "1"),
}


def slow_once(owner, name):
    original, delays = getattr(owner, name), [SECONDS]

    def slow(*args, **kwargs):
        time.sleep(delays.pop() if delays else 0)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


if __name__ == "__main__":
    longnet_dist.distributed.patience.MESSAGE_SECONDS = 1.0
    for place in os.environ["SLOW"].split(","):
        owner, name, rank = PLACES[place]
        if os.environ["RANK"] == rank:
            slow_once(owner, name)
    sys.exit(main(sys.argv[1:]))
