"""A failure here means: under Lightning, ranks do not learn what one process does, or a mistake passes in silence."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.data import DistributedSampler, default_collate

from longnet_dist import LongNetConfig, next_token_labels
from tests.launch.jobs import forked
from tests.launch.trainers.examples import losses_in, output_of

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
CLOSE = {"rel": 0, "abs": 2e-9}
N, CLIP = 61, 1.5
DOCUMENTS = torch.tensor([0, 20, 47, N])
CONFIG = LongNetConfig(
    vocab_size=30, d_model=16, num_layers=2, num_heads=2, segment_lengths=(8, 64), dilation_rates=(1, 4)
)


def make_sequences(num_sequences=10, rows=N):
    """Make sequences with uneven numbers of valid targets."""
    tokens = (torch.arange(num_sequences)[:, None] * 3 + torch.arange(rows) * 7) % 30
    targets = next_token_labels(tokens)
    for i, label in enumerate(targets):
        label[rows - 1 - 5 * i :] = -100
    return [{"tokens": a, "targets": b} for a, b in zip(tokens, targets, strict=True)]


def make_batches(sequences, size):
    return [default_collate(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def fit_alone(weighting, documents=None):
    """Fit on this process, in plain PyTorch, and return (losses, model).

    As in the job: two epochs of five batches, and steps of two batches.
    """
    torch.manual_seed(0)
    model, sampler = CONFIG.build(dtype=torch.float64), DistributedSampler(make_sequences(), 1, 0, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # Adam would hide a wrong scale.
    all_losses, norms, size = [], [], 1 if weighting == "manual" else 2
    for epoch in (0, 1):
        sampler.set_epoch(epoch)  # Lightning shuffles training data that it shards.
        batches = make_batches([make_sequences()[i] for i in sampler], 2)
        for step in (batches[first : first + size] for first in range(0, 5, size)):
            losses = [model(batch["tokens"], None, batch["targets"], documents) for batch in step]
            counts = [int((batch["targets"] != -100).sum()) for batch in step]
            # Without counts, Lightning divides by accumulate_grad_batches, also in a last step of fewer batches.
            by_token = weighting == "by token"
            weights = [n / sum(counts) for n in counts] if by_token else [1 / size] * len(step)
            optimizer.zero_grad()
            sum(loss * weight for loss, weight in zip(losses, weights, strict=True)).backward()
            if by_token:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
            all_losses += [loss.item() for loss in losses]
    assert not norms or min(norms) < CLIP < max(norms)
    return all_losses, model


def test_the_example_has_the_losses_of_one_process_on_two():
    """Here Lightning starts the second process. In the other tests, both run before Lightning does."""
    one = output_of("lightning_train.py", 1, "--devices", 1)
    two = output_of("lightning_train.py", 1, "--devices", 2, forks=False)
    assert losses_in(two) == pytest.approx(losses_in(one), **CLOSE)
    under_torchrun = output_of("lightning_train.py", 2, forks=False)
    assert losses_in(under_torchrun) == pytest.approx(losses_in(one), **CLOSE)


@pytest.fixture(scope="module")
def job_results(tmp_path_factory):
    """The results of each rank, by the number of groups: one group of two ranks, and two that resume its checkpoint."""
    folder = tmp_path_factory.mktemp("lightning")
    for groups in (1, 2):
        job = forked(2 * groups, "-m", "tests.launch.trainers.lightning_job", folder)
        assert job.returncode == 0, job.stderr
    return {
        groups: [json.loads((folder / f"{groups}-{rank}.json").read_text()) for rank in range(2 * groups)]
        for groups in (1, 2)
    }


def mean_losses(ranks, name):
    """The mean loss of each forward over the tokens of all groups; the two ranks of a group must have the same loss."""
    groups = [results[name] for results in ranks[::2]]
    assert [results[name] for results in ranks[1::2]] == groups
    return [sum(loss * n for loss, n in forward) / sum(n for _, n in forward) for forward in zip(*groups, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_ranks_learn_what_one_process_does(job_results, groups):
    """Accumulated batches have uneven numbers of tokens, the last is alone in its step, and gradients are clipped."""
    expected, model = fit_alone("by token")
    assert expected[9] < expected[0]
    assert mean_losses(job_results[groups], "by token") == pytest.approx(expected, **CLOSE)
    held_out = make_batches(make_sequences(4), 2 // groups)
    with torch.no_grad():
        validated = [model(batch["tokens"], None, batch["targets"]).item() for batch in held_out]
    for results in job_results[groups]:
        mean = pytest.approx(sum(validated) / len(validated), **CLOSE)
        assert results["validated"] == results["validated again"] == mean
        logged = [loss for other in job_results[groups] for loss, _ in other["by token"][5:]]
        assert results["logged"] == pytest.approx(sum(logged) / len(logged), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["by batch", "manual"])
def test_without_tokens_every_batch_weighs_the_same(job_results, weighting):
    """That is usual in Lightning. In manual optimization, too, gradients have the right scale."""
    assert mean_losses(job_results[1], weighting) == pytest.approx(fit_alone(weighting)[0], **CLOSE)


@pytest.mark.slow
def test_packed_documents_are_passed_to_the_model(job_results):
    expected = fit_alone("by batch", DOCUMENTS)[0]
    assert mean_losses(job_results[1], "packed") == pytest.approx(expected, **CLOSE)
    assert expected != pytest.approx(fit_alone("by batch")[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_resumed_run_learns_what_an_uninterrupted_one_does(job_results, groups, layout):
    """It resumes from a checkpoint of two ranks, on two or four."""
    losses = mean_losses(job_results[groups], f"from a {layout}")
    assert losses == pytest.approx(fit_alone("by token")[0][5:], **CLOSE)


ERRORS = {
    (1, "ddp"): "the Trainer's strategy is DDPStrategy",
    (1, "plain"): "the Trainer's strategy is ModelParallelStrategy",
    (1, "seeds"): "before configure_model differs between ranks 0 to 1",
    (1, "parameters"): "before configure_model differs between ranks 0 to 1",
    (1, "sampler"): "the batch differs between ranks 0 to 1",
    (1, "number"): "the number of training batches differs between ranks 0 to 1",
    (1, "number to validate"): "the number of validation batches differs between ranks 0 to 1",
    (1, "number to test"): "the number of test batches differs between ranks 0 to 1",
    (1, "unsharded"): r"3 parameters \(model.embedding.weight, .* are not sharded over all 2 ranks",
    (1, "unsplit"): r"pass mesh.split\(x\), not the whole sequence",
    (1, "length"): "mesh.split takes the whole sequence",
    (1, "local tokens"): '"tokens" differs between ranks 0 to 1',
    (1, "one token more"): '"tokens" differs between ranks 0 to 1',
    (1, "some tokens"): "for some batches of a step only",
    (1, "local loss"): r"the loss differs between ranks 0 to 1, .* return token_loss\(logits, targets, mesh\)",
    (1, "manual tokens"): "in automatic optimization",
    (2, "same"): "all 2 data-parallel groups have the same batch",
    (2, "half"): "are not sharded over all 4 ranks",
    (2, "sizes"): "multiplied should equal the world size",
    (2, "sampler"): "the batch differs between ranks 0 to 1",
    (2, "seeds"): "before configure_model differs between ranks 0 to 3",
    (2, "number"): "the number of training batches differs between ranks 0 to 3",
}


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "case"), ERRORS)
def test_what_would_be_silently_wrong_raises_on_every_rank(job_results, groups, case):
    for results in job_results[groups]:
        assert re.search(ERRORS[groups, case], results["errors"][case]), results["errors"][case]
