"""A failure here means: an encoder's results depend on the number of ranks, or on the padding of a ragged batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNetConfig, LongNetEncoder, SequenceMesh
from longnet_dist.models.masking import mask_tokens

CONFIG = LongNetConfig(d_model=16, num_layers=2, num_heads=4, segment_lengths=(8, 32), dilation_rates=(1, 4))
TORCHSCALE = dataclasses.replace(CONFIG, head_phases="blocked", padding="torchscale", position="none")


def build(config=CONFIG, **options):
    torch.manual_seed(1)
    return LongNetEncoder(config, dtype=torch.float64, **options)


def features_and_gradients(encoder, inputs, pooling, mesh=None, lengths=None):
    """Pooled features, and the gradients of all parameters, summed over ranks."""
    local = inputs if mesh is None else encoder.split(inputs, mesh)
    pooled = encoder(local, mesh, lengths, pooling=pooling)
    parameters = list(encoder.parameters())
    grads = torch.autograd.grad((pooled * torch.arange(16)).sum(), parameters, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return [pooled, *(grads if mesh is None else [mesh.sum(grad) for grad in grads])]


def encode_over_ranks(group, config, num_inputs, lengths):
    for options in ({"class_token": True}, {"class_token": True, "input_dim": 5}, {}):
        encoder = build(config, **options)
        inputs = (
            torch.randn(2, num_inputs, 5).double() if options.get("input_dim") else torch.randint(257, (2, num_inputs))
        )
        mesh = SequenceMesh(group, config.pattern, num_inputs + bool(options))
        for pooling in ("class", "mean") if options else ("mean",):
            expected = features_and_gradients(encoder, inputs, pooling, lengths=lengths)
            actual = features_and_gradients(encoder, inputs, pooling, mesh, lengths)
            assert_close(actual, expected, rtol=0, atol=1e-11)
        start, stop = mesh.shard.start, mesh.shard.stop
        for rows, all_rows in zip(
            encoder.hidden_states(encoder.split(inputs, mesh), mesh, lengths),
            encoder.hidden_states(inputs, None, lengths),
            strict=True,
        ):
            assert_close(rows, all_rows[:, start:stop], rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="rows"):
            encoder(inputs.repeat_interleave(2, 1), mesh)


@pytest.mark.parametrize("config", [CONFIG, TORCHSCALE], ids=["exact", "torchscale"])
@pytest.mark.parametrize(
    ("world", "num_inputs", "lengths"),
    [(2, 61, [30, 61]), (4, 90, None), (4, 2, [2, 0]), pytest.param(8, 61, None, marks=pytest.mark.slow)],
)
def test_results_do_not_depend_on_the_number_of_ranks(pool, config, world, num_inputs, lengths):
    """Chunks are even, uneven or empty; the class token is row 0."""
    pool.run(world, encode_over_ranks, config, num_inputs, None if lengths is None else torch.tensor(lengths))


def moved_rows_over_ranks(group):
    config = dataclasses.replace(TORCHSCALE, segment_lengths=(9, 90), dilation_rates=(1, 4))
    encoder, mesh = build(config), SequenceMesh(group, config.pattern, 100)
    with pytest.raises(ValueError, match=r"branch \(w=90, r=4\): r does not divide w, so torchscale's padding moves"):
        encoder(encoder.split(torch.randint(257, (1, 100)), mesh), mesh)


def test_rows_that_torchscale_moves_are_refused_over_ranks(pool):
    pool.run(2, moved_rows_over_ranks)


@pytest.mark.parametrize("pooling", ["class", "mean", None])
def test_padding_changes_nothing(pooling):
    encoder = build(class_token=True)
    tokens = torch.randint(257, (2, 50))
    ragged = encoder(tokens, lengths=torch.tensor([50, 23]), pooling=pooling)
    alone = encoder(tokens[1:, :23], pooling=pooling)
    assert_close(ragged[1:] if pooling else ragged[1:, :24], alone, rtol=0, atol=1e-12)
    assert_close(ragged[:1], encoder(tokens[:1], pooling=pooling), rtol=0, atol=1e-12)


def test_every_token_sees_every_other():
    encoder = build(class_token=True)
    tokens = torch.randint(257, (1, 31))
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 257
    assert not torch.equal(encoder(tokens, pooling="class"), encoder(changed, pooling="class"))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients(mode):
    tokens = torch.randint(257, (2, 40))
    expected = features_and_gradients(build(class_token=True), tokens, "class")
    encoder = build(dataclasses.replace(CONFIG, activation_checkpointing=mode), class_token=True)
    assert_close(features_and_gradients(encoder, tokens, "class"), expected, rtol=0, atol=1e-12)


def test_position_embeddings_are_added_to_inputs():
    encoder = build(input_dim=16, class_token=True)
    positions = torch.randn(1, 9, 16, dtype=torch.float64)
    first = encoder.hidden_states(torch.zeros(2, 9, 16, dtype=torch.float64), positions=positions)[0]
    assert_close(first[:, 1:], positions.expand(2, -1, -1), rtol=0, atol=0)
    assert_close(first[:, 0], encoder.class_token.expand(2, -1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.zeros(1, 4, 3), {}, r"they must be token ids, \(B, N\)"),
        (torch.zeros(1, 4, dtype=torch.int64), {"pooling": "class"}, "this encoder has no class token"),
        (torch.zeros(1, 4, dtype=torch.int64), {"pooling": "last"}, "it must be 'class', 'mean' or None"),
        (torch.zeros(1, 4, dtype=torch.int64), {"positions": torch.zeros(1, 5, 16)}, r"positions is \(1, 5, 16\)"),
    ],
)
def test_mistakes_are_named(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        build()(inputs, **options)
    with pytest.raises(ValueError, match=r"it must be \(B, N, input_dim\) = \(B, N, 5\)"):
        build(input_dim=5)(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"lengths is \[5\]; each must be between 0 and N = 4"):
        build(class_token=True)(torch.zeros(1, 4, dtype=torch.int64), lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="input_dim is 0"):
        build(input_dim=0)


def masked_loss_over_ranks(group):
    """The loss over ranks, and the sum of its gradients, are those of one process, though ranks hide unequally many."""
    encoder, tokens = build(), torch.randint(257, (2, 61))
    whole = [mask_tokens(row, 61, 0, mask_id=256, num_ids=256, seed=[n]) for n, row in enumerate(tokens)]
    expected = encoder(torch.stack([x for x, _ in whole]), targets=torch.stack([y for _, y in whole]))
    mesh = SequenceMesh(group, CONFIG.pattern, 61)
    start, stop = mesh.shard.start, mesh.shard.stop
    parts = [
        mask_tokens(row[start:stop], 61, start, mask_id=256, num_ids=256, seed=[n]) for n, row in enumerate(tokens)
    ]
    loss = encoder(torch.stack([x for x, _ in parts]), mesh, targets=torch.stack([y for _, y in parts]))
    assert_close(loss, expected, rtol=0, atol=1e-12)
    parameters = list(encoder.parameters())
    grads, expected_grads = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(mesh.sum(grad), expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_masked_pretraining_does_not_depend_on_the_number_of_ranks(pool, world):
    pool.run(world, masked_loss_over_ranks)
