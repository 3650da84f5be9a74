"""A failure here means: an option of the layer computes something else than its definition, or none of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, layer_norm
from torch.testing import assert_close

from longnet_dist import (
    ALiBiBias,
    DilatedAttention,
    LongNetConfig,
    LongNetEncoder,
    Pattern,
    dense_reference,
    dilated_attention,
)
from longnet_dist.attention.bias import alibi_slopes
from longnet_dist.nn.block import Block
from longnet_dist.nn.multiway import Multiway

PATTERN = Pattern((8, 20), (1, 3))
F64 = torch.float64


def attended(layer, x, norm=lambda y: y, **options):
    """The layer's attention by the oracle, with its own projections, before its inner norm: (B, N, E)."""
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    return dense_reference(norm(q), norm(k), v, PATTERN, causal=layer.causal, **options).flatten(2)


def test_slopes_are_the_published_ones():
    assert_close(alibi_slopes(8, dtype=F64)[0], torch.tensor([0.5**i for i in range(1, 9)], dtype=F64))
    # 12 heads: those of 8, and then the first, third, ... of 16.
    more = [2 ** (-0.5 * i) for i in (1, 3, 5, 7)]
    expected = torch.tensor([0.5**i for i in range(1, 9)] + more, dtype=F64)
    assert_close(alibi_slopes(12, dtype=F64)[0], expected, rtol=1e-12, atol=0)
    assert alibi_slopes(1).tolist() == [[2**-8]]


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_is_slope_times_true_distance(causal):
    torch.manual_seed(0)
    slopes = alibi_slopes(4, dtype=F64).requires_grad_()
    q, k, v = torch.randn(3, 2, 50, 4, 8, dtype=F64, requires_grad=True).unbind()
    dout, results = torch.randn(2, 50, 4, 8, dtype=F64), []
    position = torch.arange(50)
    matrix = -slopes[0, :, None, None] * (position[:, None] - position).abs()

    class Given(ALiBiBias):
        name = "matrix of the test"

        def values(self, parameters, distance, causal):
            return matrix

    for function, bias in ((dilated_attention, ALiBiBias(slopes)), (dense_reference, Given(slopes))):
        out = function(q, k, v, PATTERN, causal=causal, bias=bias)
        results.append([out, *torch.autograd.grad(out, [q, k, v, slopes], dout, retain_graph=True)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_alibi_in_a_layer(num_kv_heads):
    """Also with one write head."""
    layer = DilatedAttention.from_pattern(32, 4, PATTERN, use_alibi=True, num_kv_heads=num_kv_heads, dtype=F64)
    x = torch.randn(2, 50, 32, dtype=F64)
    expected = layer.out_proj(attended(layer, x, bias=ALiBiBias(alibi_slopes(4, dtype=F64))))
    assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert not any("alibi" in name for name in layer.state_dict())
    assert layer.k_proj.out_features == 8 * num_kv_heads


@pytest.mark.parametrize("qk_norm", ["layer", "rms"])
def test_queries_and_keys_are_normalised_by_head(qk_norm):
    layer = DilatedAttention.from_pattern(32, 4, PATTERN, qk_norm=qk_norm, num_kv_heads=2, dtype=F64)
    weight = torch.randn(8, dtype=F64)
    with torch.no_grad():
        layer.q_norm.weight.copy_(weight)
        layer.k_norm.weight.copy_(weight)

    def norm(y):
        y = y - y.mean(-1, keepdim=True) if qk_norm == "layer" else y
        eps = 1e-5 if qk_norm == "layer" else torch.finfo(F64).eps
        return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    x = torch.randn(2, 50, 32, dtype=F64)
    assert_close(layer(x), layer.out_proj(attended(layer, x, norm=norm)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sub_layernorm", [False, True])
def test_sub_layernorm_of_a_block(sub_layernorm):
    layer = DilatedAttention.from_pattern(32, 4, PATTERN, inner_norm=sub_layernorm, dtype=F64)
    block, x = Block(layer, 40, dtype=F64), torch.randn(1, 30, 32, dtype=F64)
    sub = (lambda y: layer_norm(y, y.shape[-1:])) if sub_layernorm else (lambda y: y)
    after = x + layer.out_proj(sub(attended(layer, layer_norm(x, (32,)))))
    hidden = sub(gelu(block.ffn.fc1(layer_norm(after, (32,)))))
    assert_close(block(x), after + block.ffn.fc2(hidden), rtol=0, atol=1e-12)
    config = LongNetConfig(d_model=32, num_layers=1, sub_layernorm=sub_layernorm)
    assert any("inner_norm" in name for name in config.build().state_dict()) == sub_layernorm


def test_multiway_tokens_have_the_weights_of_their_kind():
    """Projections and norms by kind; attention is over all tokens."""
    torch.manual_seed(0)
    layer = DilatedAttention.from_pattern(32, 4, PATTERN, multiway=True, inner_norm=True, dtype=F64)
    x, kinds = torch.randn(2, 50, 32, dtype=F64), torch.rand(2, 50) < 0.4
    chosen = kinds[..., None]
    q, k, v = (
        torch.where(chosen, p.B(x), p.A(x)).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = layer_norm(dense_reference(q, k, v, PATTERN).flatten(2), (32,))
    expected = torch.where(chosen, layer.out_proj.B(out), layer.out_proj.A(out))
    assert_close(layer(x, token_types=kinds), expected, rtol=0, atol=1e-12)
    assert_close(layer(x, token_types=torch.zeros_like(kinds)), layer(x), rtol=0, atol=1e-12)


def test_a_multiway_encoder_has_two_encoders_weights():
    """Inputs of one kind are those of an encoder with that kind's weights."""
    torch.manual_seed(0)
    config = LongNetConfig(d_model=16, num_layers=2, segment_lengths=(8, 32), dilation_rates=(1, 4))
    both = LongNetEncoder(replace(config, multiway=True), class_token=True, dtype=F64)
    one = LongNetEncoder(config, class_token=True, dtype=F64)
    weights = both.state_dict()
    assert any(not torch.equal(x, weights[n.replace(".A.", ".B.")]) for n, x in weights.items() if "proj.A.weight" in n)
    one.load_state_dict({name.replace(".A.", "."): x for name, x in weights.items() if ".B." not in name})
    tokens = torch.randint(257, (2, 40))
    assert_close(both(tokens), one(tokens), rtol=0, atol=1e-12)
    kinds = torch.zeros(2, 40, dtype=torch.bool)
    kinds[:, 7] = True
    changed = both(tokens, token_types=kinds)
    assert (changed[:, 0] - one(tokens)[:, 0]).abs().max() > 1e-3
    assert sum(isinstance(m, Multiway) for m in both.modules()) == 1 + 2 * 8
    states = both.hidden_states(tokens, token_types=kinds)
    assert_close(both.norm(states[-1])[:, :7], changed[:, :7], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it.
def test_ids_tell_the_kinds_of_tokens():
    """In a model, its caches, its loss and its compiled blocks, as given kinds do."""
    torch.manual_seed(0)
    config = LongNetConfig(d_model=16, num_layers=2, vocab_size=20, segment_lengths=(8, 32), dilation_rates=(1, 4))
    model = replace(config, multiway=True, multiway_first_id=12).build(dtype=F64).eval()
    told = replace(config, multiway=True).build(dtype=F64).eval()
    told.load_state_dict(model.state_dict())
    tokens = torch.randint(20, (2, 40))
    expected = told(tokens, token_types=tokens >= 12)
    assert (expected - told(tokens)).abs().max() > 1e-3
    assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    losses = (
        model(tokens, targets=tokens.roll(-1, 1)),
        told(tokens, targets=tokens.roll(-1, 1), token_types=tokens > 11),
    )
    assert_close(*losses, rtol=0, atol=1e-12)
    cache = model.new_cache(2)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(13, dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(told.parameters()))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    actual = model(tokens)
    assert_close(actual, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(actual.square().sum(), list(model.parameters()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_alibi": True, "use_rel_pos_bias": True}, "a layer has one position bias"),
        ({"use_alibi": True, "padding": "torchscale"}, "allows no position bias"),
        ({"qk_norm": "batch"}, "qk_norm is 'batch'; it must be 'none', 'rms' or 'layer'"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedAttention.from_pattern(32, 4, PATTERN, **arguments)


def test_wrong_kinds_of_tokens_are_refused():
    x, kinds = torch.zeros(1, 5, 32), torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="multiway=True"):
        DilatedAttention.from_pattern(32, 4, PATTERN)(x, token_types=kinds)
    with pytest.raises(ValueError, match=r"it must be bool, \(B, N or L\) = \(1, 5\)"):
        DilatedAttention.from_pattern(32, 4, PATTERN, multiway=True)(x, token_types=kinds[:, :4])


@pytest.mark.parametrize("position", ["alibi", "t5", "none"])
def test_position_of_a_model(position):
    torch.manual_seed(0)
    options = {"d_model": 16, "num_layers": 1, "segment_lengths": (8,), "dilation_rates": (1,)}
    model = LongNetConfig(position=position, **options).build(dtype=F64)
    layer, x = model.blocks[0].attention, torch.randn(1, 8, 16, dtype=F64)
    if position == "t5":
        torch.nn.init.normal_(layer.rel_pos_bias)
    last, permuted = (layer(y)[:, -1] for y in (x, x[:, [2, 0, 1, 5, 4, 3, 6, 7]]))
    assert torch.allclose(last, permuted, rtol=0, atol=1e-12) == (position == "none")


@pytest.mark.parametrize(("before", "now"), [(True, "rms"), (False, "none")])
def test_qk_norm_of_earlier_versions(before, now):
    assert LongNetConfig(qk_norm=before).qk_norm == now
