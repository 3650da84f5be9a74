"""A failure here means: what Hugging Face's Trainer learns or logs across ranks differs from one process."""

from __future__ import annotations

import pytest
import torch

from tests.launch.jobs import forked
from tests.launch.trainers.examples import losses_in, outputs_with_accelerate

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_the_example_has_the_losses_of_one_process_on_two(tmp_path):
    """Here accelerate starts the processes; the other tests start theirs directly."""
    one, two = (
        [*losses_in(output), float(output.split("evaluated  loss ")[1])]
        for output in outputs_with_accelerate("hf_trainer_train.py", tmp_path)
    )
    assert two == pytest.approx(one, abs=2e-9)


@pytest.fixture(scope="module")
def job_results(tmp_path_factory):
    """The results of each of four ranks."""
    folder = tmp_path_factory.mktemp("job")
    job = forked(4, "-m", "tests.launch.trainers.hf_trainer_job", folder)
    assert job.returncode == 0, job.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("meshes", "num_sequences"), [("one mesh", 13), ("two meshes", 12)])
def test_ranks_train_as_one_process_of_the_stock_trainer(job_results, tmp_path, meshes, num_sequences):
    """The job has accumulation, uneven labels, a ragged last batch, evaluations, and a resumed run."""
    from transformers import Trainer

    from tests.launch.trainers.hf_trainer_job import train

    expected = train(tmp_path, trainer_class=Trainer, num_sequences=num_sequences)
    for results in job_results:
        for name, value in expected.items():
            tolerance = 5e-7 if name == "losses" else 1e-10  # Trainer sums the losses that it logs in float32.
            assert results[meshes][name] == pytest.approx(value, abs=tolerance), name


@pytest.mark.slow
def test_what_would_be_wrong_raises_on_every_rank(job_results):
    for rank, results in enumerate(job_results):
        for expected, message in results["errors"].items():
            assert expected in message, f"rank {rank}"
