"""A failure here means: a document shows code that does not run, or names a file that does not exist, or misses one."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "longnet_dist"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
DOCUMENTS_WITH_CODE = README + "".join(
    (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("index", "integrations", "pattern", "guides/documents", "guides/encoders", "guides/torchscale")
)

SUFFIXES = "py|sh|sbatch|yaml|toml|md"
OF_A_RUN = ("runs/", "traces/", "site/")
"""Folders that documents name, but that exist only after a command has created them."""


@pytest.mark.filterwarnings("ignore")  # Frameworks warn when they are imported.
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", DOCUMENTS_WITH_CODE, re.DOTALL))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "torchtitan" in block:
        pytest.importorskip("torchtitan")  # It needs a newer torch than the oldest that we support.
    exec(compile(block, "a document", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (document.parent / link).exists(), link
    for path in re.findall(rf"`([\w./-]+\.(?:{SUFFIXES})|(?:[\w-]+/)+)`", text):
        if path not in OF_A_RUN:
            assert any((folder / path).exists() for folder in (ROOT, PACKAGE, ROOT / "launchers")), path


@pytest.mark.parametrize(("name", "sections"), [("reliability", slice(1, 5)), ("ray", slice(None))])
def test_every_promise_names_the_tests_that_prove_it(name, sections):
    """Each name is that of a test; a promise without a test says that it is unproven."""
    text = (ROOT / "docs" / f"{name}.md").read_text()
    parts = (
        text.split("\n## ")[sections] if name == "reliability" else [text.split("\n## Faults\n")[1].split("\n## ")[0]]
    )
    promises = [promise for part in parts for promise in re.findall(r"^- (?:.|\n  )+", part, re.MULTILINE)]
    assert len(promises) > 10
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for promise in promises:
        proofs = re.findall(r"`(test_\w+)`", promise.partition("*Proof:*")[2])
        assert proofs or "*Unproven.*" in promise, promise
        for proof in proofs:
            assert re.search(rf"^def {proof}\(", tests, re.MULTILINE), proof


@pytest.mark.filterwarnings("ignore")
def test_the_api_reference_is_complete():
    """`make docs` checks it, too, and fails."""
    script = runpy.run_path(str(ROOT / "docs" / "check_reference.py"))
    script["on_pre_build"](SimpleNamespace(docs_dir=ROOT / "docs"))


def test_the_readme_lists_every_folder_and_module_of_the_package_and_no_other():
    section = README.split("## How to read the code")[1].split("\n## ")[0]
    listed = re.findall(r"`([\w./]+)`", "".join(re.findall(r"^\|(.*?)\|", section, re.MULTILINE)))
    folders = [f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")]
    modules = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert sorted(listed) == sorted(folders + modules)


def test_lines_of_the_readme_have_at_most_100_characters():
    assert not [line for line in README.splitlines() if len(line) > 100]


def test_every_dependency_and_extra_is_in_a_table_of_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [re.match(r"[\w-]+", dependency)[0] for dependency in project["dependencies"]]
    assert dependencies
    assert not [name for name in dependencies if f"\n| {name} " not in README]
    rows = "".join(re.findall(r"^\|(.*?)\|", README.split("\n## Dependencies")[1], re.MULTILINE))
    assert not [name for name in project["optional-dependencies"] if f"`{name}`" not in rows]


def test_nothing_says_to_install_a_release():
    """There is none yet, so pip would find no package, or another one."""
    paths = [path for folder in (PACKAGE, ROOT / "launchers", ROOT / "examples") for path in folder.rglob("*.*")]
    texts = [path for path in [*paths, *DOCUMENTS] if path.suffix in {f".{suffix}" for suffix in SUFFIXES.split("|")}]
    assert len(texts) > 100
    assert not [path for path in texts if re.search(r"longnet[-_]dist\[|pip install '?longnet", path.read_text())]
