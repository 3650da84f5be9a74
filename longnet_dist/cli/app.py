"""The entry point of `longnet-dist`. tyro reads each option and its help from the type and docstring of a function."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import tyro
except ModuleNotFoundError:  # The library needs it for the command line alone.
    print("longnet-dist: the command line needs the package tyro: pip install tyro", file=sys.stderr)
    sys.exit(2)

from longnet_dist import __version__
from longnet_dist.best_effort import BestEffort
from longnet_dist.cli.doctor import run_doctor
from longnet_dist.cli.draw import run_draw
from longnet_dist.cli.export import run_export
from longnet_dist.cli.generate import run_generate
from longnet_dist.cli.options import PathError, check_values, path_registry
from longnet_dist.cli.plan import run_calibrate, run_plan
from longnet_dist.cli.report import run_report
from longnet_dist.cli.score import run_embed, run_eval, run_score
from longnet_dist.cli.slides import run_embed_slides
from longnet_dist.cli.tokenize import run_tokenize
from longnet_dist.cli.train import resumed, run_train

SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "train": run_train,
    "tokenize": run_tokenize,
    "eval": run_eval,
    "score": run_score,
    "generate": run_generate,
    "embed": run_embed,
    "embed-slides": run_embed_slides,
    "export": run_export,
    "report": run_report,
    "draw": run_draw,
    "plan": run_plan,
    "calibrate": run_calibrate,
    "doctor": run_doctor,
}
_DESCRIPTION = """Train, evaluate and inspect LongNet models on very long sequences.

Run `longnet-dist COMMAND --help` for the options of a command, and `longnet-dist --version` for the version."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The command line without the program's name; by default that of this process.

    Returns:
        The exit status: 0; 2 if the arguments, or what they name, cannot work; 1 for a failure while working; 130 after
        Ctrl-C, except in a run, which then writes a checkpoint.
        The reason is one line on stderr. Only an error of this program itself has a traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(f"longnet-dist {__version__}")
        return 0
    try:
        check_values(arguments)
        run = parse(arguments)
        run()
    except (ValueError, OSError, OverflowError, PathError) as error:
        return _fail(error, 2)
    except (RuntimeError, MemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(InterruptedError("interrupted"), 130)
    except Exception as error:
        _record_for_torchrun(error, traceback.format_exc())
        raise
    return 0


def _defer(command: Callable[..., None]) -> Callable[..., functools.partial[None]]:
    """Wrap a command so that it returns its call, in place of running: parsing and running fail differently."""

    @functools.wraps(command)
    def deferred(*args: Any, **options: Any) -> functools.partial[None]:
        return functools.partial(command, *args, **options)

    return deferred


def parse(arguments: list[str]) -> functools.partial[None]:
    """Return the call of the command that the arguments name.

    Args:
        arguments: The command line without the program's name.

    Raises:
        ValueError: for a value that cannot be read or cannot work, which tyro would print in a frame.
        SystemExit: after tyro's message about arguments that it cannot parse, or its help.
    """
    app = tyro.extras.SubcommandApp()
    for name, command in SUBCOMMANDS.items():
        # `longnet-dist --help` shows the first line of each docstring, and the help of one command its whole docstring.
        if name == "train" and (folder := _resumed_folder(arguments)):
            command = resumed(folder)
        summary = None if arguments[:1] == [name] else str(command.__doc__).partition("\n")[0]
        app.command(name=name, help=summary)(_defer(command))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run: functools.partial[None] = app.cli(
                prog="longnet-dist",
                description=_DESCRIPTION,
                args=arguments,
                config=(tyro.conf.CascadeSubcommandArgs,),
                registry=path_registry(),
            )
    except SystemExit:
        message = " ".join(re.sub("[│╭╮╰╯─]|-{4,}", " ", errors.getvalue()).split())
        pattern = r"Error parsing (?:__\S+__\.(?:config\.)?)?(?:--)?(\S+): (.*?) (?:Argument|For full) helptext"
        if bad_value := re.search(pattern, message):
            raise ValueError(f"--{bad_value[1]}: {bad_value[2]}") from None
        sys.stderr.write(errors.getvalue())
        raise
    sys.stderr.write(errors.getvalue())
    return run


def _resumed_folder(arguments: list[str]) -> str | None:
    """Return the value of --resume, which decides the defaults of the other options."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        if arguments[:1] == ["train"] and argument.partition("=")[0] == "--resume":
            return argument.partition("=")[2] or following
    return None


def _fail(error: Exception, status: int) -> int:
    """Print an error as one line on stderr, and return the exit status.

    Under torchrun, a ValueError is that of every rank, and rank 0 prints it. torchrun's own report shows all errors.
    """
    lines = str(error).split("\n") if str(error) else [repr(error)]
    message = f"longnet-dist: {' '.join(line.strip() for line in lines if line.strip())}"
    _record_for_torchrun(error, message)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0" and isinstance(error, ValueError):
        return status
    print(message, file=sys.stderr)
    return status


def _record_for_torchrun(error: Exception, message: str) -> None:
    """Write the file from which torchrun reports why a rank failed, as torch's `record` does, without a traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": details}})
        with BestEffort("torchrun's report"):
            Path(file).write_text(text)
