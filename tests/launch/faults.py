"""`longnet-dist train`, in which rank 1 meets faults in step 5: FAULTS, separated by commas, one in each start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import longnet_dist.checkpoint
from longnet_dist import cli
from longnet_dist.train import _Trainer

STEP = 5
FAULTS = os.environ.get("FAULTS", "").split(",")
MARKS = [Path(os.environ.get("FAULT_MARKS", ".")) / fault for fault in FAULTS]  # Files, of those that a start has met.
WHERE, WHAT = next((f for f, mark in zip(FAULTS, MARKS, strict=True) if not mark.exists()), "nowhere nothing").split()
windows, loss, save = _Trainer._windows, _Trainer._loss, longnet_dist.checkpoint.save
now = 0


def fault():
    mark = MARKS[FAULTS.index(f"{WHERE} {WHAT}")]
    if now != STEP + (WHERE == "save") or os.environ["RANK"] != "1" or mark.exists():
        return
    mark.touch()
    if WHAT == "raise":
        raise RuntimeError("a fault that was asked for")
    if WHAT == "sleep":
        oversleep()
    if WHAT == "SIGSTOP":  # Until the others have given up.
        subprocess.Popen(["sh", "-c", f"sleep 10; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), getattr(signal, WHAT))


def oversleep():
    time.sleep(12)


def windows_with_fault(self, step, micro, every=False):
    global now
    now = step
    if WHERE == "forward":
        fault()
    return windows(self, step, micro, every)


def loss_with_fault(self, stream, indices):
    value = loss(self, stream, indices)
    if WHAT == "nan" and now == STEP and os.environ["RANK"] == "1":
        value = value * float("nan")
    if WHERE == "backward" and value.requires_grad:
        value.register_hook(lambda grad: fault())
    return value


def save_with_fault(*args, **kwargs):
    if WHERE == "save":
        fault()
    return save(*args, **kwargs)


if __name__ == "__main__":
    _Trainer._windows, _Trainer._loss = windows_with_fault, loss_with_fault
    longnet_dist.checkpoint.save = save_with_fault
    sys.exit(cli.main(sys.argv[1:]))
