"""A failure here means: `import longnet_dist` lacks a public name, or takes seconds because it imports torch."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

import longnet_dist

COMMANDS = (
    "train",
    "tokenize",
    "eval",
    "score",
    "generate",
    "embed",
    "embed-slides",
    "export",
    "report",
    "draw",
    "plan",
    "doctor",
)


def test_public_names_are_what_their_modules_define():
    for name in set(longnet_dist.__all__) - {"__version__"}:
        value = getattr(longnet_dist, name)
        assert value is getattr(importlib.import_module(value.__module__), name)
        assert not isinstance(value, types.ModuleType)
    assert set(longnet_dist.__all__) <= set(dir(longnet_dist))


def test_no_module_has_the_name_of_a_public_name():
    """A submodule replaces the attribute of its name when it is imported."""
    modules = {module.name for module in pkgutil.iter_modules(longnet_dist.__path__)}
    assert not modules & set(longnet_dist.__all__)


def test_no_command_module_has_the_name_of_its_function():
    from longnet_dist import cli

    for module in pkgutil.iter_modules(cli.__path__):
        assert not hasattr(importlib.import_module(f"longnet_dist.cli.{module.name}"), module.name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'longnet_dist' has no attribute 'Longnet'"):
        _ = longnet_dist.Longnet


def test_only_the_command_line_needs_tyro():
    """Checked in a new process, in which tyro cannot be imported."""
    code = """
import sys
sys.modules["tyro"] = None
import longnet_dist
from longnet_dist.functional import scaled_dot_product_dilated_attention
assert all(hasattr(longnet_dist, name) for name in longnet_dist.__all__)
model = longnet_dist.LongNetConfig(d_model=8, num_layers=1, num_heads=2).build()
assert longnet_dist.TrainConfig().model.num_layers and model.eval().score("text").isfinite().all()
import longnet_dist.__main__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "longnet-dist: the command line needs the package tyro: pip install tyro\n"


def test_help_and_version_import_no_torch():
    """Checked in a new process, because the tests' own process has torch."""
    arguments = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    code = f"""
import sys
from longnet_dist.cli.app import main
for arguments in {arguments}:
    try:
        assert main(arguments) == 0
    except SystemExit as exit:
        assert not exit.code
    assert "torch" not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: longnet-dist {command}" in done.stdout
    assert f"longnet-dist {longnet_dist.__version__}\n" in done.stdout
