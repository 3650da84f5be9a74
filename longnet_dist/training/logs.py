"""What a run says while it runs: a live display, metrics.jsonl, TensorBoard and Weights & Biases, all on rank 0."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longnet_dist.data.shards import write_whole
from longnet_dist.extras import extra


class RunLog:
    """Writes into `folder`, None says and writes nothing; and to the `project` of Weights & Biases, if there is one."""

    def __init__(self, folder: Path | None, config: dict[str, Any], steps: int, project: str = "") -> None:
        self.folder, self.config, self.steps, self.project = folder, config, steps, project
        self.wandb: Any = None
        self.metrics: IO[str] | None = None
        self.board: Any = None
        self.failed = False

    def __enter__(self) -> RunLog:
        if self.folder is None:
            return self
        self.console = Console(soft_wrap=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        self.task = self.progress.add_task("train", total=self.steps, loss=float("nan"), rate=0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self.progress.stop()
            with contextlib.suppress(OSError):
                if self.metrics is not None:
                    self.metrics.close()
            with contextlib.suppress(OSError):
                if self.board is not None:
                    self.board.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=int(kind is not None))

    def begin(self, step: int) -> None:
        """Go on after `step`: what is logged of later steps, by a run that was stopped, is dropped."""
        if self.folder is None:
            return
        write_whole(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        path = self.folder / "metrics.jsonl"
        before = path.read_text().splitlines(keepends=True) if path.exists() else []
        write_whole(path, "".join(line for line in before if _step_of(line) <= step))
        self.metrics = path.open("a", buffering=1)
        # Events of later steps are of the run that was stopped, and TensorBoard drops them too.
        self.board = self._board(purge_step=step + 1)
        if self.project:
            self.wandb = _wandb_run(self.project, self.folder, self.config)
        self.progress.update(self.task, completed=step)

    def _board(self, purge_step: int) -> Any:
        # It takes a second to import, and only a training run's rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder), purge_step=purge_step)
        described = json.dumps(self.config, indent=2)
        board.add_text("config", f"```json\n{described}\n```")
        return board

    def step(self, measured: dict[str, float]) -> None:
        """One step's numbers: `step`, `loss`, `tokens_per_second` and others."""
        if self.metrics is None:
            return
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        try:
            self.metrics.write(json.dumps(finite) + "\n")
            for name, value in measured.items():
                self.board.add_scalar(name, value, int(measured["step"]))
            if self.wandb is not None:
                self.wandb.log(finite, step=int(measured["step"]))
        except OSError as error:
            # A full disk costs figures, not the run.
            if not self.failed:
                warnings.warn(f"the figures of step {measured['step']} and later may be missing: {error}", stacklevel=2)
            self.failed = True
        self.progress.update(self.task, advance=1, loss=measured["loss"], rate=measured["tokens_per_second"])
        every = max(1, self.steps // 20)
        if "validation_bits_per_byte" in measured or (not self.console.is_terminal and measured["step"] % every == 0):
            self.say(_line(measured, self.steps))

    def say(self, text: str) -> None:
        """A line above the live display."""
        if self.folder is not None:
            self.progress.console.print(text, highlight=False, markup=False)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for what a crash left of one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _wandb_run(project: str, folder: Path, config: dict[str, Any]) -> Any:
    with extra("wandb", f"--wandb {project}"):
        import wandb
    # The same id for the same folder: a run that goes on is one run there, too.
    run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, dir=folder, id=run, name=folder.name, config=config, resume="allow")


def _line(measured: dict[str, float], steps: int) -> str:
    left = (steps - measured["step"]) * measured["seconds"]
    line = (
        f"step {measured['step']:g}/{steps}  loss {measured['loss']:.3f}  "
        f"{measured['tokens_per_second']:,.0f} tokens/s  ETA {left:.0f} s"
    )
    if "validation_bits_per_byte" in measured:
        line += f"  validation {measured['validation_bits_per_byte']:.3f} bits per byte"
    return line
