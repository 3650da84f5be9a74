"""A failure here means: code in a document does not run over ranks, or with what its comments offer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, forked

pytestmark = [pytest.mark.launch, pytest.mark.timeout(200)]

START = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
if not dist.is_initialized():
    dist.init_process_group("gloo")
device_mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("sp",))
"""


LIGHTNING = """
import torch
from torch.utils.data import DataLoader
loader = DataLoader(torch.randint(256, (2, 500)), batch_size=1)
"""
"""The data that the block of Lightning names, but does not make."""


def blocks() -> list[str]:
    """Return the Python code of the documents whose code runs over ranks."""
    text = "".join((ROOT / path).read_text() for path in ("README.md", "docs/integrations.md"))
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def replaced(block: str, *changes: tuple[str, str]) -> str:
    """Return the code with each change made, which the document's text must allow."""
    for old, new in changes:
        assert old in block, old
        block = block.replace(old, new)
    return block


def variants(folder: Path) -> list[str]:
    """Return the code of each block in each way that its comments offer, for two ranks, in an order that can run."""
    as_it_stands, with_groups = [], []
    for block in blocks():
        if "SequenceMesh(group" in block:
            as_it_stands.append(block)
            block = replaced(block, ('dist.init_process_group("gloo")', "pass"))
            group = "dist.group.WORLD if dist.is_initialized() else None"
            with_groups.append(replaced(block, (group, 'device_mesh["sp"]')))
        elif "DilatedTrainer(" in block:
            group = "SequenceMesh(torch.distributed.group.WORLD"
            with_groups.append(replaced(block, ("SequenceMesh(None", group), ("runs/trainer", str(folder))))
        elif "SequenceMesh(None" in block:
            for group in ('device_mesh["sp"]', "dist.group.WORLD"):
                with_groups.append(replaced(block, ("SequenceMesh(None", f"SequenceMesh({group}")))
        elif "# trainer.fit(" in block:
            options = f"devices=2, max_epochs=1, enable_progress_bar=False, default_root_dir={str(folder)!r}"
            block = replaced(block, ("devices=1", options), ("# trainer.fit(", "trainer.fit("))
            with_groups.append(LIGHTNING + block)
        elif 'SequenceMesh(device_mesh["sp"]' in block:  # One process is shown, and torchrun starts several.
            start = 'dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)'
            with_groups.append(replaced(block, (start, ""), ("(1,)", "(2,)"), ("dist.destroy_process_group()", "")))
    return [*as_it_stands, *(START + block for block in with_groups)]


def test_code_runs_over_ranks_in_each_way_that_its_comments_offer(tmp_path: Path):
    """As it stands under torchrun, with the default group, with a DeviceMesh, and with the line in a comment."""
    codes = variants(tmp_path)
    assert len(codes) == 7
    script = tmp_path / "blocks.py"
    script.write_text(
        "\n".join(f"exec({code!r}, {{'__name__': '__main__'}})" for code in codes) + "\nprint('all ran')\n"
    )
    job = forked(2, script)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("all ran") == 2
