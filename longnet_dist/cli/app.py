"""The entry point of `longnet-dist`. tyro reads each option and its help from the type and docstring of a function."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable
from typing import Any

import tyro

from longnet_dist import __version__
from longnet_dist.cli.doctor import run_doctor
from longnet_dist.cli.draw import run_draw
from longnet_dist.cli.evaluate import run_eval
from longnet_dist.cli.export import run_export
from longnet_dist.cli.options import PathError, check_values, path_registry
from longnet_dist.cli.plan import run_plan
from longnet_dist.cli.report import run_report
from longnet_dist.cli.score import run_score
from longnet_dist.cli.tokenize import run_tokenize
from longnet_dist.cli.train import run_train

SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "train": run_train,
    "tokenize": run_tokenize,
    "eval": run_eval,
    "score": run_score,
    "export": run_export,
    "report": run_report,
    "draw": run_draw,
    "plan": run_plan,
    "doctor": run_doctor,
}
_DESCRIPTION = """Train, evaluate and inspect LongNet models on very long sequences.

Run `longnet-dist COMMAND --help` for the options of a command, and `longnet-dist --version` for the version."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The command line without the program's name; by default that of this process.

    Returns:
        The exit status: 0; 2 if the arguments, or what they name, cannot work; or 1 for a failure while working.
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


def _fail(error: Exception, status: int) -> int:
    """Print an error as one line on stderr, and return the exit status."""
    lines = str(error).split("\n") if str(error) else [repr(error)]
    print(f"longnet-dist: {' '.join(line.strip() for line in lines if line.strip())}", file=sys.stderr)
    return status
