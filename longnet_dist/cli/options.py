"""Rules that several subcommands share for the values of their options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import tyro

from longnet_dist.paths import local_path
from longnet_dist.plan.pattern import MAX_SIZE

Run = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
"""A positional argument: the folder of a run, or its URL in an object store."""
_LIST_OPTIONS = ("--data", "--edges", "--ray.labels", "--ray.resources")
"""Options that accept any number of values, so tyro would accept them without a value."""
_MAY_BE_EMPTY = ("--wandb",)


def parse_count(text: str) -> int:
    """Read a whole number: 65536, 1e9, 2^30, or 64K, 1M and 1G, which are multiples of 1024, as contexts are named.

    Raises:
        ValueError: If the text is none of these.
    """
    if power := re.fullmatch(r"(\d{1,3})\^(\d{1,2})", text):
        return int(power[1]) ** int(power[2])
    if scaled := re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMG]?)", text):
        count = Fraction(scaled[1]) * 1024 ** " KMG".index(scaled[2] or " ")
        if count.denominator == 1:
            return int(count)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number; write it as 65536, 1e9, 2^30, 64K, 1M or 1G") from None


Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda values: parse_count(values[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda count: [str(count)],
    ),
]
"""An option whose value `parse_count` reads."""


class PathError(Exception):
    """A path that cannot be used. It is not a ValueError, which tyro would print in a frame of several lines."""


def check_values(arguments: Sequence[str]) -> None:
    """Check that no value is empty or missing, as when a script expands an unset variable.

    Args:
        arguments: The command line without the program's name.

    Raises:
        ValueError: If an option or a positional argument has no value.
    """
    option = ""
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            if option.replace("_", "-") in _LIST_OPTIONS and not equals and following.startswith("--"):
                raise ValueError(f"{option} has no value; give one, or leave the option out")
        if (not argument or (argument.startswith("--") and equals and not value)) and option not in _MAY_BE_EMPTY:
            raise ValueError(
                f"{option} is empty; give a value, or leave the option out"
                if option
                else f"an argument of {arguments[0] or 'longnet-dist'} is empty"
            )


def check_positive(options: dict[str, int]) -> None:
    """Check that each value is at least 1, and at most `MAX_SIZE`.

    Args:
        options: The value of each option, by its name without the leading dashes.

    Raises:
        ValueError: If a value is not.
    """
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
        if value > MAX_SIZE:
            raise ValueError(f"--{name} is {value}; it must be at most {MAX_SIZE} (2^48)")


def check_ending(path: Path, endings: Sequence[str]) -> None:
    """Check that the name of a file has one of these endings, in upper or lower case.

    Args:
        path: The file to draw into.
        endings: The endings that are allowed, each with its dot.

    Raises:
        ValueError: If the name has another ending, or none.
    """
    if path.suffix.lower() not in endings:
        choices = f"{', '.join(endings[:-1])} or {endings[-1]}"
        raise ValueError(f"cannot draw into {path}; use a name that ends in {choices}")


def path_registry() -> tyro.constructors.ConstructorRegistry:
    """Return a registry with which tyro reads every option of type Path by `local_path`, which expands `~`."""
    registry = tyro.constructors.ConstructorRegistry()

    def read(values: list[str]) -> Path:
        try:
            return local_path(values[0])
        except ValueError as error:
            raise PathError(str(error)) from None

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=read,
            is_instance=lambda x: isinstance(x, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def join_help_lines(*configs: type) -> None:
    """Set the help of each field of a config to its docstring, as one paragraph.

    Without this, tyro shows the line breaks of the source.

    Args:
        configs: Dataclasses whose fields have a docstring each.
    """
    for config in configs:
        (definition,) = ast.parse(inspect.getsource(config)).body
        assert isinstance(definition, ast.ClassDef)
        docstrings = {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in itertools.pairwise(definition.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        for option in dataclasses.fields(config):
            option.metadata = MappingProxyType({**option.metadata, "help": docstrings[option.name]})
