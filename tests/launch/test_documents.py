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


def blocks() -> list[str]:
    """Return the code of documents that says how it runs over ranks."""
    text = "".join((ROOT / path).read_text() for path in ("README.md", "docs/integrations.md"))
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if 'device_mesh["sp"]' in block]


def test_code_runs_over_ranks_in_each_way_that_its_comments_offer(tmp_path: Path):
    """As it stands under torchrun, with the default group, and with a DeviceMesh."""
    variants = []
    for block in blocks():
        # The document shows one process, and says that torchrun starts several.
        block = block.replace('dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)', "")
        block = block.replace('"cpu", (1,)', '"cpu", (dist.get_world_size(),)').replace(
            "dist.destroy_process_group()", ""
        )
        as_it_stands = block if "init_process_group" in block else START + block
        with_mesh = START + re.sub(
            r"(group = |SequenceMesh\()(dist\.group\.WORLD if .* else None|None)", r'\1device_mesh["sp"]', block
        ).replace('dist.init_process_group("gloo")', "pass")
        with_group = with_mesh.replace('SequenceMesh(device_mesh["sp"]', "SequenceMesh(dist.group.WORLD")
        variants += [with_mesh, with_group]
        variants += [as_it_stands] if "init_process_group" in block else []
    assert len(variants) >= 5
    # The variant that initialises the process group by itself comes first.
    variants.sort(key=lambda code: START in code)
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(f"exec({code!r}, {{}})" for code in variants) + "\nprint('all ran')\n")
    job = forked(2, script)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("all ran") == 2
