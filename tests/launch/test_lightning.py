"""A failure here means: under Lightning, ranks do not learn what one process does, or something goes silently wrong."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.data import DistributedSampler, default_collate

from longnet_dist import LongNetConfig, next_token_labels
from tests.launch.jobs import forked, run
from tests.launch.test_integrations import curve

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
CLOSE = {"rel": 0, "abs": 2e-9}
N, CLIP = 61, 1.5
CONFIG = LongNetConfig(
    vocab_size=30, d_model=16, num_layers=2, num_heads=2, segment_lengths=(8, 64), dilation_rates=(1, 4)
)


def data(sequences=10, rows=N):
    """Sequences of uneven counts of valid labels."""
    tokens = (torch.arange(sequences)[:, None] * 3 + torch.arange(rows) * 7) % 30
    labels = next_token_labels(tokens)
    for i, label in enumerate(labels):
        label[rows - 1 - 5 * i :] = -100
    return [{"tokens": a, "labels": b} for a, b in zip(tokens, labels, strict=True)]


def batches(sequences, size):
    return [default_collate(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def alone(weigh):
    """(losses, model) of the same fit on this process, in plain PyTorch: two epochs, five batches, steps of two."""
    torch.manual_seed(0)
    model, sampler, seen, norms = CONFIG.build(dtype=torch.float64), DistributedSampler(data(), 1, 0, seed=0), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # Adam would not see a wrong scale.
    for epoch in (0, 1):
        sampler.set_epoch(epoch)  # Lightning shuffles what it shards for training.
        made, size = batches([data()[i] for i in sampler], 2), 1 if weigh == "manual" else 2
        for step in (made[first : first + size] for first in range(0, 5, size)):
            losses = [model(batch["tokens"], None, batch["labels"]) for batch in step]
            counts = [int((batch["labels"] != -100).sum()) for batch in step]
            # Without counts Lightning divides by accumulate_grad_batches, also in a last step of fewer.
            weights = [n / sum(counts) for n in counts] if weigh == "by token" else [1 / size] * len(step)
            optimizer.zero_grad()
            sum(loss * weight for loss, weight in zip(losses, weights, strict=True)).backward()
            if weigh == "by token":
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
            seen += [loss.item() for loss in losses]
    assert not norms or min(norms) < CLIP < max(norms)
    return seen, model


def test_example():
    """Lightning starts the second process itself; torchrun starts the jobs of the other tests."""
    done = [begin(1, "examples/lightning_train.py", "--devices", n) for begin, n in ((forked, 1), (run, 2))]
    assert [job.returncode for job in done] == [0, 0], done
    assert curve(done[1].stdout) == pytest.approx(curve(done[0].stdout), **CLOSE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By groups, what each rank wrote: one sequence over two ranks, and two such groups, which go on from the first."""
    folder = tmp_path_factory.mktemp("lightning")
    for groups in (1, 2):
        done = forked(2 * groups, "-m", "tests.launch.lightning_job", folder)
        assert done.returncode == 0, done.stderr
    return {
        groups: [json.loads((folder / f"{groups}-{rank}.json").read_text()) for rank in range(2 * groups)]
        for groups in (1, 2)
    }


def losses(ranks, name):
    """Of each forward of a fit, the mean over the tokens of all groups; the two ranks of a group have one loss."""
    groups = [found[name] for found in ranks[::2]]
    assert [found[name] for found in ranks[1::2]] == groups
    return [sum(loss * n for loss, n in forward) / sum(n for _, n in forward) for forward in zip(*groups, strict=True)]


@pytest.mark.parametrize("groups", [1, 2])
def test_ranks_learn_what_one_process_does(found, groups):
    """Accumulated batches of uneven counts of tokens, the last alone, and clipping."""
    expected, model = alone("by token")
    assert expected[9] < expected[0]
    assert losses(found[groups], "by token") == pytest.approx(expected, **CLOSE)
    with torch.no_grad():
        last = [model(batch["tokens"], None, batch["labels"]).item() for batch in batches(data(4), 2 // groups)]
    for rank in found[groups]:
        assert rank["validated"] == rank["validated again"] == pytest.approx(sum(last) / len(last), **CLOSE)
        logged = [loss for other in found[groups] for loss, _ in other["by token"][5:]]
        assert rank["logged"] == pytest.approx(sum(logged) / len(logged), **CLOSE)


@pytest.mark.parametrize("weigh", ["by batch", "manual"])
def test_without_tokens_it_is_as_ever_in_lightning(found, weigh):
    """Every batch weighs the same; manual optimization has the scale of gradients too."""
    assert losses(found[1], weigh) == pytest.approx(alone(weigh)[0], **CLOSE)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_goes_on_as_if_it_had_not_stopped(found, groups, kind):
    """From a checkpoint of two ranks, on two or four."""
    assert losses(found[groups], f"from a {kind}") == pytest.approx(alone("by token")[0][5:], **CLOSE)


REFUSED = {
    (1, "ddp"): "the Trainer's strategy is DDPStrategy",
    (1, "plain"): "the Trainer's strategy is ModelParallelStrategy",
    (1, "seeds"): "before configure_model differs between ranks 0 to 1",
    (1, "parameters"): "before configure_model differs between ranks 0 to 1",
    (1, "sampler"): "the batch differs between ranks 0 to 1",
    (1, "number"): "the number of training batches differs between ranks 0 to 1",
    (1, "number to validate"): "the number of validation batches differs between ranks 0 to 1",
    (1, "number to test"): "the number of test batches differs between ranks 0 to 1",
    (1, "loose"): r"3 parameters \(model.embedding.weight, .* are not sharded over all 2 ranks",
    (1, "unsplit"): r"pass mesh.split\(x\), not the whole sequence",
    (1, "length"): "mesh.split takes the whole sequence",
    (1, "local tokens"): '"tokens" differs between ranks 0 to 1',
    (1, "one token more"): '"tokens" differs between ranks 0 to 1',
    (1, "some tokens"): "for some batches of a step only",
    (1, "local loss"): r"the loss differs between ranks 0 to 1, .* return token_loss\(logits, labels, mesh\)",
    (1, "manual tokens"): "in automatic optimization",
    (2, "same"): "all 2 data-parallel groups have the same batch",
    (2, "half"): "are not sharded over all 4 ranks",
    (2, "sizes"): "multiplied should equal the world size",
    (2, "sampler"): "the batch differs between ranks 0 to 1",
    (2, "seeds"): "before configure_model differs between ranks 0 to 3",
    (2, "number"): "the number of training batches differs between ranks 0 to 3",
}


@pytest.mark.parametrize(("groups", "case"), REFUSED)
def test_what_would_be_silently_wrong_is_refused_on_every_rank(found, groups, case):
    for rank in found[groups]:
        assert re.search(REFUSED[groups, case], rank["refused"][case]), rank["refused"][case]
