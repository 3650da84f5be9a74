"""A failure here means: a document shows code that does not run, or has a broken link or an outdated list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
DOCUMENTS_WITH_CODE = README + "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("index", "integrations"))


@pytest.mark.filterwarnings("ignore")  # Those of the frameworks, when they are imported.
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", DOCUMENTS_WITH_CODE, re.DOTALL))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a document", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_tests_exist(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (document.parent / link).exists(), link
    for file in re.findall(r"`((?:tests|examples)/[\w/]+\.py)`", text):
        assert (ROOT / file).exists(), file


def test_every_module_is_in_the_readmes_table():
    modules = {p.name for p in (ROOT / "longnet_dist").glob("*.py") if not p.name.startswith("__")}
    assert not [m for m in modules if f"`{m}`" not in README]


def test_every_dependency_is_in_the_readmes_table():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w-]+)>=', project.split("dependencies = [")[1].split("]")[0])
    assert listed
    assert not [name for name in listed if f"\n| {name}" not in README]
