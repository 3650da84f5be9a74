"""A failure here means: the layer or the model does not do what its arguments say."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import (
    DilatedAttention,
    LongNetConfig,
    Pattern,
    dense_reference,
    dilated_attention,
    next_token_labels,
    token_loss,
)
from longnet_dist.attention.bias import t5_bucket
from longnet_dist.nn.rotary import Rotation
from tests.cases import Case, output_and_gradients


def test_the_public_arguments_come_first_and_in_order():
    parameters = inspect.signature(DilatedAttention).parameters.items()
    assert [n for n, p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == [
        "d_model", "num_heads", "dilation_rate", "segment_size", "dropout", "causal", "use_xpos", "use_rel_pos_bias",
    ]  # fmt: skip


@pytest.mark.parametrize("num_tokens", [128, 1000])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"use_xpos": True}, {"use_rel_pos_bias": True}])
def test_shapes_and_gradients(num_tokens, options):
    layer = DilatedAttention(d_model=512, num_heads=8, dilation_rate=2, segment_size=64, dropout=0.2, **options)
    x = torch.randn(16, num_tokens, 512, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_layer_is_projections_around_the_reference():
    layer = DilatedAttention(32, 4, (1, 3), (8, 20), causal=True, num_kv_heads=2, dtype=torch.float64)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = layer.out_proj(dense_reference(q, k, v, Pattern((8, 20), (1, 3)), causal=True).flatten(2))
    assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_from_pattern_has_the_branches_and_phases_of_the_pattern():
    pattern = Pattern((8, 20), (1, 3), head_phases="blocked")
    torch.manual_seed(0)
    layer = DilatedAttention.from_pattern(32, 4, pattern, causal=True, dtype=torch.float64)
    torch.manual_seed(0)
    expected = DilatedAttention(32, 4, (1, 3), (8, 20), causal=True, head_phases="blocked", dtype=torch.float64)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    assert layer.pattern == expected.pattern == pattern
    assert_close(layer(x), expected(x), rtol=0, atol=0)


def test_dropout_applies_to_the_output_and_only_in_training():
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
    rotation = Rotation.at(positions, 8, torch.float64, xpos_length=xpos_length)
    rotated_q, rotated_k = rotation.queries(q.expand(1, 6, 1, 8)), rotation.keys(k.expand(1, 6, 1, 8))
    scores = (rotated_q[0, 1::2, 0] * rotated_k[0, ::2, 0]).sum(-1)
    assert_close(scores, scores[:1].expand(3), rtol=0, atol=1e-12)


def test_rotation_is_exact_at_a_billion():
    """With float32 angles, neighbours at 10^9 would have the same position."""
    rotation = Rotation.at(torch.tensor([10**9, 10**9 + 1]), 64)
    angle = torch.atan2(rotation.sin, rotation.cos).double()
    step = (angle[1] - angle[0]).remainder(2 * math.pi)
    expected = 10000 ** -(torch.arange(0, 64, 2).double() / 64)
    assert_close(step, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 131_072), (torch.float16, 16_384)])
def test_xpos_beyond_the_range_of_its_dtype_is_refused(dtype, length):
    """At these lengths, torchscale's xPos becomes NaN."""
    with pytest.raises(ValueError, match="Use rotary positions, a scale base of at least"):
        Rotation.at(torch.arange(2), 64, dtype, xpos_length=length)
    wider = Rotation.at(torch.tensor([0, length - 1]), 64, dtype, xpos_length=length, xpos_scale_base=8 * 512)
    assert wider.queries(torch.ones(1, 2, 1, 64, dtype=dtype)).isfinite().all()


def test_xpos_without_causal_reaches_half_as_far():
    """xPos raises the score of a key ahead of its query, by the scales of both."""
    for num_tokens, causal, in_range in ((65_536, True, True), (65_536, False, False), (32_768, False, True)):
        layer = DilatedAttention(8, 1, 64, 65_536, causal=causal, use_xpos=True)
        if in_range:
            assert layer(torch.randn(1, num_tokens, 8)).isfinite().all()
        else:
            with pytest.raises(ValueError, match="half as many if queries see keys ahead"):
                layer(torch.randn(1, num_tokens, 8))


def test_xpos_within_range_is_finite():
    rotation = Rotation.at(torch.tensor([0, 65_535]), 64, xpos_length=65_536)
    x = torch.full((1, 2, 1, 64), 100.0)
    for rotated in (rotation.queries(x), rotation.keys(x)):
        assert rotated.isfinite().all()
        assert (rotated.abs().amax(-1) > 0).all()


def test_t5_buckets():
    """T5's rule: exact for near keys, geometric for far ones, one last bucket; both directions unless causal."""
    causal = t5_bucket(torch.arange(-2, 200), 32, 128, causal=True)
    assert causal[:2].tolist() == [0, 0]
    assert causal[2:18].tolist() == list(range(16))
    assert causal.max() == 31
    assert (causal[2 + 128 :] == 31).all()
    assert (causal.diff() >= 0).all()
    both = t5_bucket(torch.tensor([0, 1, -1, 7, -7, 1000, -1000]), 32, 128, causal=False)
    assert both.tolist() == [0, 1, 17, 7, 23, 15, 31]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 7}, "cannot be split into 7 heads.*for example 8"),
        ({"num_heads": 0}, "cannot be split into 0 heads"),
        ({"num_kv_heads": 3}, "must divide num_heads = 8: one of"),
        ({"d_model": 24, "use_xpos": True}, "= 3 is odd"),
        ({"dilation_rate": 65}, "rate 65 is above its segment length 64"),
        ({"dilation_rate": (1, 2)}, "segment_lengths has 1"),
        ({"use_rel_pos_bias": True, "rel_pos_buckets": 3}, "3 buckets"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedAttention(**({"d_model": 64, "num_heads": 8, "dilation_rate": 2, "segment_size": 64} | arguments))


def test_input_of_another_width_is_refused():
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
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_checkpointing_and_offloading_change_no_gradient(mode, offload, device):
    """The loss that computes logits in parts changes none, either."""
    torch.manual_seed(0)
    memory = {"activation_checkpointing": mode, "offload_activations": offload}
    model = LongNetConfig(**SMALL, **memory).build(dtype=torch.float64).to(device)
    tokens = torch.randint(257, (1, 50), generator=torch.Generator().manual_seed(0))
    loss = model(tokens.to(device), targets=next_token_labels(tokens.to(device)))
    grads = [grad.cpu() for grad in torch.autograd.grad(loss, list(model.parameters()))]
    torch.manual_seed(0)
    plain = LongNetConfig(**SMALL).build(dtype=torch.float64)
    expected = torch.autograd.grad(token_loss(plain(tokens), next_token_labels(tokens)), list(plain.parameters()))
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, rtol=0, atol=1e-13)


def test_tied_embeddings_share_one_parameter():
    assert len(list(LongNetConfig(**SMALL).build().parameters())) + 1 == len(
        list(LongNetConfig(**SMALL, tie_embeddings=False).build().parameters())
    )


def test_autocast_runs_in_bfloat16():
    model = LongNetConfig(**SMALL, qk_norm=True).build()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randint(257, (1, 50)))
    assert logits.dtype == torch.bfloat16


def test_a_layer_with_a_relative_bias_compiles_whole():
    layer = DilatedAttention(32, 4, (1, 2), (8, 16), causal=True, use_rel_pos_bias=True)
    torch.nn.init.normal_(layer.rel_pos_bias)
    inputs = [torch.randn(1, 20, 32, requires_grad=True), *layer.parameters()]
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = call(inputs[0])
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for compiled, eager in zip(*results, strict=True):
        assert_close(compiled, eager)


def test_mixed_dtypes_are_cast_inside_autocast_and_refused_outside():
    """Rotary positions leave queries and keys in float32, and values in bfloat16."""
    q, k = torch.randn(2, 1, 40, 4, 8).unbind()
    v, pattern = torch.randn(1, 40, 4, 8).bfloat16(), Pattern((8, 32), (1, 4))
    with pytest.raises(ValueError, match="q, k and v must have one dtype"):
        dilated_attention(q, k, v, pattern)
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(q, k, v, pattern)
        assert dilated_attention(q.double(), k.double(), v.double(), pattern).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, dilated_attention(q.bfloat16(), k.bfloat16(), v, pattern), rtol=0, atol=0)


def test_kernels_compute_in_float32_inside_autocast():
    """The eager kernel upcasts bfloat16; autocast would undo it."""
    case = Case(Pattern((8, 32), (1, 4)), N=40, H=4, G=2, B=1, D=8, causal=True, biased=True)
    expected = output_and_gradients(case, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(case, torch.bfloat16)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 12])
def test_weights_begin_as_magneto_says(num_layers):
    """Xavier normal: values, outputs and the feed-forward network have gain sqrt(log 2 M), queries and keys 1."""
    width, hidden = 96, 160
    config = LongNetConfig(
        d_model=width, num_layers=num_layers, num_heads=4, num_kv_heads=2, ffn_dim=hidden, segment_lengths=(8,),
        dilation_rates=(1,),
    )  # fmt: skip
    model = config.build()
    gain = math.sqrt(math.log(2 * max(num_layers, 2)))
    for name, weight in model.blocks.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 2:
            factor = 1 if any(part in name for part in ("q_proj", "k_proj")) else gain
            expected = factor * math.sqrt(2 / sum(weight.shape))
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(weight.mean().item()) < 0.05 * expected * 3, name
