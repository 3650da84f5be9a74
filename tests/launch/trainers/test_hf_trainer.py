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
def test_bfloat16_is_near_float32_on_one_rank_and_on_several(job_results, tmp_path):
    """Under autocast, transformers' rotary positions leave queries and keys in float32, and values in bfloat16."""
    from transformers import Trainer

    from tests.launch.trainers.hf_trainer_job import losses_in_float32

    expected = losses_in_float32(tmp_path, None, Trainer)
    one = losses_in_float32(tmp_path, None, bf16=True)
    for losses in (one, *(results["bfloat16"] for results in job_results)):
        assert losses == pytest.approx(expected, rel=5e-3)
        assert losses != pytest.approx(expected, rel=1e-6), "it was not computed in bfloat16"


@pytest.mark.slow
def test_packed_documents_have_the_losses_of_one_process(job_results, tmp_path):
    from tests.launch.trainers.hf_trainer_job import losses_of_packed

    expected = losses_of_packed(tmp_path, None)
    for results in job_results:
        assert results["packed"] == pytest.approx(expected, abs=5e-7)


@pytest.mark.slow
def test_what_would_be_wrong_raises_on_every_rank(job_results):
    for rank, results in enumerate(job_results):
        for expected, message in results["errors"].items():
            assert expected in message, f"rank {rank}"
