"""A failure here means: the layer or the model is not what its arguments say."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import DilatedAttention, LongNetConfig, Pattern, dense_reference, next_token_labels, token_loss
from longnet_dist.attention.bias import relative_bucket
from longnet_dist.nn.attention import Rotation


def test_the_public_arguments_come_first_and_in_order():
    names = list(inspect.signature(DilatedAttention).parameters.items())
    assert [n for n, p in names if p.kind is not inspect.Parameter.KEYWORD_ONLY] == [
        "d_model", "num_heads", "dilation_rate", "segment_size", "dropout", "causal", "use_xpos", "use_rel_pos_bias",
    ]  # fmt: skip


@pytest.mark.parametrize("num_tokens", [128, 1000])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"use_xpos": True}, {"use_rel_pos_bias": True}])
def test_the_issues_shapes(num_tokens, options):
    layer = DilatedAttention(d_model=512, num_heads=8, dilation_rate=2, segment_size=64, dropout=0.2, **options)
    x = torch.randn(16, num_tokens, 512, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_is_projections_around_the_oracle():
    layer = DilatedAttention(32, 4, (1, 3), (8, 20), causal=True, num_kv_heads=2, dtype=torch.float64)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = layer.out_proj(dense_reference(q, k, v, Pattern((8, 20), (1, 3)), causal=True).flatten(2))
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_dropout_is_on_the_output_and_only_in_training():
    layer = DilatedAttention(16, 2, 1, 8, dropout=0.5)
    x = torch.randn(4, 30, 16)
    assert 0.4 < (layer(x) == 0).float().mean() < 0.6
    layer.eval()
    assert_close(layer(x), layer(x))
    assert (layer(x) == 0).sum() == 0


@pytest.mark.parametrize("xpos_length", [None, 300])
def test_rotation_makes_scores_depend_on_distance_alone(xpos_length):
    q, k = torch.randn(2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 3, 100, 103, 290, 293])
    turn = Rotation.at(positions, 8, torch.float64, xpos_length=xpos_length)
    turned_q, turned_k = turn.queries(q.expand(1, 6, 1, 8)), turn.keys(k.expand(1, 6, 1, 8))
    scores = (turned_q[0, 1::2, 0] * turned_k[0, ::2, 0]).sum(-1)
    assert_close(scores, scores[:1].expand(3), rtol=0, atol=1e-12)


def test_rotation_is_exact_at_a_billion():
    """In float32 angles, neighbours at 10^9 would be the same position."""
    far = Rotation.at(torch.tensor([10**9, 10**9 + 1]), 64)
    angle = torch.atan2(far.sin, far.cos).double()
    step = (angle[1] - angle[0]).remainder(2 * math.pi)
    expected = 10000 ** -(torch.arange(0, 64, 2).double() / 64)
    assert_close(step, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 131_072), (torch.float16, 16_384)])
def test_xpos_beyond_float_range_is_refused(dtype, length):
    """Where torchscale's becomes NaN."""
    with pytest.raises(ValueError, match="Use rotary positions, a scale base of at least"):
        Rotation.at(torch.arange(2), 64, dtype, xpos_length=length)
    wider = Rotation.at(torch.tensor([0, length - 1]), 64, dtype, xpos_length=length, xpos_scale_base=8 * 512)
    assert wider.queries(torch.ones(1, 2, 1, 64, dtype=dtype)).isfinite().all()


def test_xpos_that_is_not_causal_reaches_half_as_far():
    """A key ahead has a score that xPos raises, by both its and the query's scale."""
    for num_tokens, causal, fine in ((65_536, True, True), (65_536, False, False), (32_768, False, True)):
        layer = DilatedAttention(8, 1, 64, 65_536, causal=causal, use_xpos=True)
        if fine:
            assert layer(torch.randn(1, num_tokens, 8)).isfinite().all()
        else:
            with pytest.raises(ValueError, match="half as many where keys ahead are seen"):
                layer(torch.randn(1, num_tokens, 8))


def test_xpos_within_range_is_finite():
    turn = Rotation.at(torch.tensor([0, 65_535]), 64, xpos_length=65_536)
    for turned in (turn.queries(torch.full((1, 2, 1, 64), 100.0)), turn.keys(torch.full((1, 2, 1, 64), 100.0))):
        assert turned.isfinite().all()
        assert (turned.abs().amax(-1) > 0).all()


def test_relative_buckets():
    """The rule of T5: exact near, geometric far, one last bucket; both sides where not causal."""
    causal = relative_bucket(torch.arange(-2, 200), 32, 128, causal=True)
    assert causal[:2].tolist() == [0, 0]
    assert causal[2:18].tolist() == list(range(16))
    assert causal.max() == 31
    assert (causal[2 + 128 :] == 31).all()
    assert (causal.diff() >= 0).all()
    both = relative_bucket(torch.tensor([0, 1, -1, 7, -7, 1000, -1000]), 32, 128, causal=False)
    assert both.tolist() == [0, 1, 17, 7, 23, 15, 31]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_heads": 7}, "cannot be cut into 7 heads.*for example 8"),
        ({"num_heads": 0}, "cannot be cut into 0 heads"),
        ({"num_kv_heads": 3}, "must divide num_heads = 8: one of"),
        ({"d_model": 24, "use_xpos": True}, "= 3 is odd"),
        ({"dilation_rate": 65}, "rate 65 is above its segment length 64"),
        ({"dilation_rate": (1, 2)}, "segment_lengths has 1"),
        ({"use_rel_pos_bias": True, "rel_pos_buckets": 3}, "3 buckets"),
    ],
)
def test_bad_sizes(arguments, said):
    with pytest.raises(ValueError, match=said):
        DilatedAttention(**({"d_model": 64, "num_heads": 8, "dilation_rate": 2, "segment_size": 64} | arguments))


def test_bad_input():
    layer = DilatedAttention(16, 2, 1, 8)
    with pytest.raises(ValueError, match=r"it must be \(B, N, d_model\) with d_model = 16"):
        layer(torch.zeros(2, 8, 15))


SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 2, "segment_lengths": (8, 32), "dilation_rates": (1, 4)}


@pytest.mark.parametrize("position", ["rotary", "xpos", "none"])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_model_is_causal(position, num_tokens):
    model = LongNetConfig(**SMALL, position=position).build(dtype=torch.float64).eval()
    tokens = torch.randint(257, (2, num_tokens))
    changed = tokens.clone()
    changed[:, num_tokens // 2 :] = (changed[:, num_tokens // 2 :] + 1) % 257
    before, after = model(tokens), model(changed)
    assert before.shape == (2, num_tokens, 257)
    assert_close(before[:, : num_tokens // 2], after[:, : num_tokens // 2], rtol=0, atol=1e-12)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("compute", ["none", "selective", "full"])
def test_what_is_kept_for_the_backward_changes_nothing(compute, offload, device):
    """Activation checkpointing, and offloading; and a loss from the head in parts."""
    torch.manual_seed(0)
    kept = {"activation_checkpointing": compute, "offload_activations": offload}
    model = LongNetConfig(**SMALL, **kept).build(dtype=torch.float64).to(device)
    tokens = torch.randint(257, (1, 50), generator=torch.Generator().manual_seed(0))
    loss = model(tokens.to(device), labels=next_token_labels(tokens.to(device)))
    grads = [grad.cpu() for grad in torch.autograd.grad(loss, list(model.parameters()))]
    torch.manual_seed(0)
    plain = LongNetConfig(**SMALL).build(dtype=torch.float64)
    expected = torch.autograd.grad(token_loss(plain(tokens), next_token_labels(tokens)), list(plain.parameters()))
    for mine, right in zip(grads, expected, strict=True):
        assert_close(mine, right, rtol=0, atol=1e-13)


def test_embeddings_are_tied_by_option():
    assert len(list(LongNetConfig(**SMALL).build().parameters())) + 1 == len(
        list(LongNetConfig(**SMALL, tie_embeddings=False).build().parameters())
    )


def test_autocast_runs_in_bfloat16():
    model = LongNetConfig(**SMALL, qk_norm=True).build()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(257, (1, 50)))
    assert logits.dtype == torch.bfloat16
