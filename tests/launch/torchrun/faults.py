"""`longnet-dist train` with faults on one rank in step 5: each start has the next of FAULTS (separated by commas)."""

import os
import signal
import sys
import time
from pathlib import Path

import longnet_dist.checkpoints.checkpoints
from longnet_dist.cli import app
from longnet_dist.training.steps import StepRunner
from longnet_dist.training.trainer import _Trainer

STEP = 5
RANK = os.environ.get("FAULT_RANK", "1")
MARKS = Path(os.environ.get("FAULT_MARKS", "."))  # A folder with a file for each fault that has happened.
REMAINING = [fault for fault in os.environ.get("FAULTS", "").split(",") if fault and not (MARKS / fault).exists()]
FAULT = (REMAINING or ["nowhere nothing"])[0]
WHERE, WHAT = FAULT.split()
windows, loss, save = StepRunner._windows, StepRunner._loss, longnet_dist.checkpoints.checkpoints.save
state = _Trainer._state
now = 0


def fault():
    mark = MARKS / FAULT
    if now != STEP + (WHERE == "save") or os.environ["RANK"] != RANK or mark.exists():
        return
    mark.touch()
    if WHAT == "raise":
        raise RuntimeError("an injected fault")
    if WHAT == "sleep":
        oversleep()
    os.kill(os.getpid(), getattr(signal, WHAT))


def oversleep():
    time.sleep(12)


def windows_with_fault(self, step, micro, all_ranks=False):
    global now
    now = step
    if WHERE == "forward":
        fault()
    return windows(self, step, micro, all_ranks)


def loss_with_fault(self, *args):
    value = loss(self, *args)
    if FAULT == "loss nan" and now == STEP and os.environ["RANK"] == RANK:
        value = value * float("nan")
    if WHERE == "backward" and value.requires_grad:
        value.register_hook(lambda grad: fault())
    return value


def state_with_fault(self):
    tensors = state(self)
    if FAULT == "state nan" and now == STEP + 1 and os.environ["RANK"] == RANK:
        tensors["optimizer.exp_avg.norm.weight"].to_local().fill_(float("nan"))
    return tensors


def save_with_fault(*args, **kwargs):
    if WHERE == "save":
        fault()
    return save(*args, **kwargs)


if __name__ == "__main__":
    StepRunner._windows, StepRunner._loss = windows_with_fault, loss_with_fault
    _Trainer._state = state_with_fault
    longnet_dist.checkpoints.checkpoints.save = save_with_fault
    sys.exit(app.main(sys.argv[1:]))
