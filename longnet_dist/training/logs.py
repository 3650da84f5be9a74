"""The logs of a run, all on rank 0: a live display, metrics.jsonl, TensorBoard and Weights & Biases.

All are best effort: the first failure to write is a warning, later ones are ignored, and the run continues. A thread
writes them, so that a slow disk, or a slow reader of stdout, does not keep the other ranks waiting in a collective.
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
from longnet_dist.extras import extra
from longnet_dist.paths import write_whole


class RunLog:
    """The logs of a run. Use it as a context manager, and call `begin` before the first step.

    Args:
        folder: the folder to write into; None, on ranks other than 0, for no logs at all.
        config: the run's options, as JSON holds them.
        steps: number of steps of the whole run.
        project: a project of Weights & Biases to log to; empty for none.
    """

    def __init__(self, folder: Path | None, config: dict[str, Any], steps: int, project: str = "") -> None:
        self.folder, self.config, self.steps, self.project = folder, config, steps, project
        self.wandb: Any = None
        self.metrics_file: IO[str] | None = None
        self.board: Any = None
        self._to_file, self._to_board = BestEffort("lines of metrics.jsonl"), BestEffort("metrics in TensorBoard")
        self._to_wandb = BestEffort("metrics in Weights & Biases")
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
            TextColumn("loss {task.fields[loss]:.3f} bits per byte  {task.fields[rate]:,.0f} tokens/s"),
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
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            if self.folder is not None:
                self._close(failed=type_ is not None)

    def _close(self, failed: bool) -> None:
        self.progress.stop()
        with self._to_file:
            if self.metrics_file is not None:
                self.metrics_file.close()
        with self._to_board:
            if self.board is not None:
                self.board.close()
        with self._to_wandb:
            if self.wandb is not None:
                self.wandb.finish(exit_code=int(failed))

    def begin(self, step: int) -> None:
        """Open the logs after `step` steps, and drop lines of later steps, which an earlier start wrote."""
        if self.folder is None:
            return
        with BestEffort(f"{self.folder / 'config.json'} and its options"):
            write_whole(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        path = self.folder / "metrics.jsonl"
        with self._to_file:
            before = path.read_text().splitlines(keepends=True) if path.exists() else []
            retained = [line for line in before if _step_of(line) <= step]
            if retained != before:
                write_whole(path, "".join(retained))
        with self._to_file:
            self.metrics_file = path.open("a", buffering=1)
        # TensorBoard drops events of later steps, too.
        with self._to_board:
            self.board = self._board(purge_step=step + 1)
        if self.project:
            self.wandb = self._wandb_run()
        self.progress.update(self.task, completed=step)

    def _wandb_run(self) -> Any:
        assert self.folder is not None
        with extra("wandb", f"--wandb {self.project}"):
            import wandb
        # The same folder has the same id, so a run that resumes is one run there, too.
        run = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        options: dict[str, Any] = {"project": self.project, "dir": self.folder, "id": run, "name": self.folder.name}
        try:
            return wandb.init(**options, config=self.config, resume="allow")
        except OSError as error:
            with self._to_wandb:
                raise error
            return None
        except wandb.Error as error:  # The caller's mistake, such as no key, or a wrong one.
            raise ValueError(
                f"--wandb {self.project}: {error}; log in by `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, "
                "or leave the option out"
            ) from None

    def _board(self, purge_step: int) -> Any:
        # The import takes a second, and only rank 0 of a training run needs it.
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder), purge_step=purge_step)
        options = json.dumps(self.config, indent=2)
        board.add_text("config", f"```json\n{options}\n```")
        return board

    def step(self, metrics: dict[str, float]) -> None:
        """Log one step's metrics: `step`, `loss`, `tokens_per_second` and others."""
        if self.folder is not None:
            self._submit(self._step, metrics)

    def print_line(self, text: str) -> None:
        """Print a line above the live display."""
        if self.folder is not None:
            self._submit(self._print, text)

    def flush(self) -> None:
        """Wait until all that was logged so far is written, or has failed."""
        while self._pending:
            self._pending.popleft().result()

    def _submit(self, write: Callable[[Any], None], argument: Any) -> None:
        """Call `write` in the background, after all calls submitted before."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(write, argument))

    def _step(self, metrics: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._to_file:
            if self.metrics_file is not None:
                self.metrics_file.write(json.dumps(finite) + "\n")
        with self._to_board:
            if self.board is not None:
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, int(metrics["step"]))
        with self._to_wandb:
            if self.wandb is not None:
                self.wandb.log(finite, step=int(metrics["step"]))
        self.progress.update(self.task, advance=1, loss=metrics["bits_per_byte"], rate=metrics["tokens_per_second"])
        due = metrics["step"] == 1 or metrics["step"] % max(1, self.steps // 20) == 0
        if "validation_bits_per_byte" in metrics or (due and not self.console.is_terminal):
            self._print(_describe_step(metrics, self.steps))

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity if a crash left the line incomplete."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _describe_step(metrics: dict[str, float], steps: int) -> str:
    seconds_left = (steps - metrics["step"]) * metrics["seconds"]
    line = (
        f"step {metrics['step']:g}/{steps}  loss {metrics['bits_per_byte']:.3f} bits per byte  "
        f"{metrics['tokens_per_second']:,.0f} tokens/s  ETA {seconds_left:.0f} s"
    )
    if "validation_bits_per_byte" in metrics:
        line += f"  validation {metrics['validation_bits_per_byte']:.3f} bits per byte"
    return line
