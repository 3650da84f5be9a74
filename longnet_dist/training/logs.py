"""What a run says while it runs: a live display, metrics.jsonl, TensorBoard and Weights & Biases, all on rank 0.

All of it is best effort: what cannot be written is one warning. A thread writes it, so that a slow disk, or a slow
reader of stdout, does not keep the other ranks waiting in a collective.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longnet_dist.best_effort import BestEffort, TolerantStream
from longnet_dist.data.shards import write_whole
from longnet_dist.extras import extra


class RunLog:
    """Writes into `folder`, None says and writes nothing; and to the `project` of Weights & Biases, if there is one."""

    def __init__(self, folder: Path | None, config: dict[str, Any], steps: int, project: str = "") -> None:
        self.folder, self.config, self.steps, self.project = folder, config, steps, project
        self.wandb: Any = None
        self.metrics: IO[str] | None = None
        self.board: Any = None
        self._to_file, self._to_board = BestEffort("lines of metrics.jsonl"), BestEffort("figures in TensorBoard")
        self._to_wandb = BestEffort("figures in Weights & Biases")
        self._writer = ThreadPoolExecutor(1, "log")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> RunLog:
        if self.folder is None:
            return self
        self.console = Console(soft_wrap=True, file=cast(IO[str], TolerantStream(sys.stdout, "stdout")))
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
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            if self.folder is not None:
                self._close(failed=kind is not None)

    def _close(self, failed: bool) -> None:
        self.progress.stop()
        with self._to_file:
            if self.metrics is not None:
                self.metrics.close()
        with self._to_board:
            if self.board is not None:
                self.board.close()
        with self._to_wandb:
            if self.wandb is not None:
                self.wandb.finish(exit_code=int(failed))

    def begin(self, step: int) -> None:
        """Go on after `step`: what is logged of later steps, by a run that was stopped, is dropped."""
        if self.folder is None:
            return
        with BestEffort(f"{self.folder / 'config.json'} and its options"):
            write_whole(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        path = self.folder / "metrics.jsonl"
        with self._to_file:
            before = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in before if _step_of(line) <= step]
            if kept != before:
                write_whole(path, "".join(kept))
        with self._to_file:
            self.metrics = path.open("a", buffering=1)
        # Events of later steps are of the run that was stopped, and TensorBoard drops them too.
        with self._to_board:
            self.board = self._board(purge_step=step + 1)
        if self.project:
            self.wandb = self._wandb_run()
        self.progress.update(self.task, completed=step)

    def _wandb_run(self) -> Any:
        assert self.folder is not None
        with extra("wandb", f"--wandb {self.project}"):
            import wandb
        # The same id for the same folder: a run that goes on is one run there, too.
        run = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        options: dict[str, Any] = {"project": self.project, "dir": self.folder, "id": run, "name": self.folder.name}
        try:
            return wandb.init(**options, config=self.config, resume="allow")
        except OSError as error:  # A wrong option or key is the caller's mistake, and raises.
            with self._to_wandb:
                raise error
            return None

    def _board(self, purge_step: int) -> Any:
        # It takes a second to import, and only a training run's rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder), purge_step=purge_step)
        described = json.dumps(self.config, indent=2)
        board.add_text("config", f"```json\n{described}\n```")
        return board

    def step(self, measured: dict[str, float]) -> None:
        """One step's numbers: `step`, `loss`, `tokens_per_second` and others."""
        if self.folder is not None:
            self._later(self._step, measured)

    def say(self, text: str) -> None:
        """A line above the live display."""
        if self.folder is not None:
            self._later(self._print, text)

    def flush(self) -> None:
        """Wait until everything so far is written, as far as it can be."""
        while self._pending:
            self._pending.popleft().result()

    def _later(self, write: Callable[[Any], None], what: Any) -> None:
        """Write in the background, in the order of the calls."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(write, what))

    def _step(self, measured: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        with self._to_file:
            if self.metrics is not None:
                self.metrics.write(json.dumps(finite) + "\n")
        with self._to_board:
            if self.board is not None:
                for name, value in measured.items():
                    self.board.add_scalar(name, value, int(measured["step"]))
        with self._to_wandb:
            if self.wandb is not None:
                self.wandb.log(finite, step=int(measured["step"]))
        self.progress.update(self.task, advance=1, loss=measured["loss"], rate=measured["tokens_per_second"])
        every = max(1, self.steps // 20)
        if "validation_bits_per_byte" in measured or (not self.console.is_terminal and measured["step"] % every == 0):
            self._print(_line(measured, self.steps))

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for what a crash left of one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _line(measured: dict[str, float], steps: int) -> str:
    left = (steps - measured["step"]) * measured["seconds"]
    line = (
        f"step {measured['step']:g}/{steps}  loss {measured['loss']:.3f}  "
        f"{measured['tokens_per_second']:,.0f} tokens/s  ETA {left:.0f} s"
    )
    if "validation_bits_per_byte" in measured:
        line += f"  validation {measured['validation_bits_per_byte']:.3f} bits per byte"
    return line
