"""A failure here means: an example of a trainer does not run as documented, or its losses depend on the ranks."""

from __future__ import annotations

import pytest

from tests.launch.trainers.examples import losses_in, output_of, outputs_with_accelerate

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]


@pytest.mark.slow
def test_transformers_has_the_losses_of_one_process_on_two_and_four():
    curves = [losses_in(output_of("transformers_train.py", ranks, forks=ranks != 2)) for ranks in (1, 2, 4)]
    assert curves[1] == pytest.approx(curves[0], abs=2e-9)
    assert curves[2] == pytest.approx(curves[0], abs=2e-9)


def test_accelerate_has_the_losses_of_one_process_on_two(tmp_path):
    one, two = map(losses_in, outputs_with_accelerate("accelerate_train.py", tmp_path))
    assert two == pytest.approx(one, abs=2e-9)


def test_plain_pytorch_has_the_losses_of_one_process_on_two_and_four():
    """The model is compiled, with FSDP2. On four ranks, the heads of each sequence are spread over two."""
    curves = []
    for ranks, head_ranks in ((1, 1), (2, 1), (4, 2)):
        curves.append(losses_in(output_of("parallelize.py", ranks, head_ranks, forks=ranks != 2)))
    assert curves[1] == pytest.approx(curves[0], abs=2e-9)
    assert curves[2] == pytest.approx(curves[0], abs=2e-9)
