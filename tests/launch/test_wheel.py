"""A failure here means: what `python -m build` makes is incomplete, or does not run once it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

import longnet_dist

ROOT = Path(__file__).parents[2]

FORWARD = """
import sys, torch, longnet_dist
from longnet_dist import LongNetConfig
assert longnet_dist.__file__.startswith(sys.prefix), longnet_dist.__file__
model = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 2)).build()
print(tuple(model(torch.zeros(1, 50, dtype=torch.int64)).shape))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that is built from the source distribution, with the build tools that are installed here."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "longnet_dist").rglob("*") if path.is_file()}
    expected = {file for file in files if "__pycache__" not in file}
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("longnet_dist/")} == expected
    assert "longnet_dist/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_installs_and_runs_in_a_fresh_environment(wheel, tmp_path):
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Dependencies come from this environment, but not its editable install: Python reads no .pth files of such a path.
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    output = _run(python.with_name("longnet-dist"), "--version", cwd=tmp_path)
    assert output == f"longnet-dist {longnet_dist.__version__}\n"
    assert _run(python, "-c", FORWARD, cwd=tmp_path) == "(1, 50, 257)\n"


def _run(*command: object, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
