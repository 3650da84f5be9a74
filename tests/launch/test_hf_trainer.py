"""A failure here means: what Hugging Face's Trainer learns or logs over ranks is not what it does on one process."""

from __future__ import annotations

import pytest
import torch

from tests.launch.jobs import by_accelerate, forked
from tests.launch.test_integrations import curve

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_the_example(tmp_path):
    """On one process, and by accelerate on two (which the job below is not started by)."""
    alone = forked(1, "examples/hf_trainer_train.py")
    assert alone.returncode == 0, alone.stderr
    said = (alone.stdout, by_accelerate(2, tmp_path, "examples/hf_trainer_train.py"))
    one, two = ([*curve(text), float(text.split("evaluated  loss ")[1])] for text in said)
    assert two == pytest.approx(one, abs=2e-9)


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    done = forked(4, "-m", "tests.launch.hf_trainer_job", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize(("meshes", "number"), [("one mesh", 13), ("two meshes", 12)])
def test_ranks_train_as_one_process_of_the_stock_trainer(of_four_ranks, tmp_path, meshes, number):
    """Accumulation, uneven labels, a ragged last batch, evaluation before and after, a run resumed."""
    from transformers import Trainer

    from tests.launch.hf_trainer_job import train

    expected = train(tmp_path, kind=Trainer, number=number)
    for found in of_four_ranks:
        for name, right in expected.items():
            limit = 5e-7 if name == "losses" else 1e-10  # Trainer sums what it logs in float32.
            assert found[meshes][name] == pytest.approx(right, abs=limit), name


def test_what_would_be_wrong_is_said_on_every_rank(of_four_ranks):
    for rank, found in enumerate(of_four_ranks):
        for expected, said in found["refusals"].items():
            assert expected in said, f"rank {rank}"
