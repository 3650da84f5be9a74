"""Fail the build where a public name has no docstring, or is not in the API reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Module, load
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]


def on_pre_build(config: Any) -> None:
    """MkDocs calls this before it builds."""
    package = load("longnet_dist", search_paths=[ROOT], resolve_aliases=True)
    shown = set(re.findall(r"^::: (\S+)$", (Path(config.docs_dir) / "reference.md").read_text(), re.MULTILINE))
    problems = [f"{name} has no docstring" for name, has_docstring in _public(package) if not has_docstring]
    needed = [*_exports(package), "longnet_dist.functional"]
    for name, module in package["integrations"].modules.items():
        if not name.startswith("_") and module.path not in shown:
            needed += _exports(module) or [module.path]
    problems += [f"{name} is not in docs/reference.md" for name in needed if name not in shown]
    if problems:
        raise PluginError("\n".join(problems))


def _exports(module: Module) -> list[str]:
    """The paths of the names in a module's __all__."""
    return [f"{module.path}.{name}" for name in module.exports or () if not str(name).startswith("__")]


def _public(package: Module) -> Iterator[tuple[str, bool]]:
    """The path of every public name, and whether it has a docstring."""
    for path in _exports(package):
        yield path, package[path.removeprefix("longnet_dist.")].has_docstring
    for module in _modules(package):
        yield module.path, module.has_docstring
        for member in module.members.values():
            if not member.is_alias and (member.is_class or member.is_function) and not member.name.startswith("_"):
                yield member.path, member.has_docstring


def _modules(module: Module) -> Iterator[Module]:
    """The public modules of a package, at any depth."""
    for inner in module.modules.values():
        if not inner.is_alias and not inner.name.startswith("_"):
            yield inner
            yield from _modules(inner)
