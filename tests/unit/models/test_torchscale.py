"""A failure here means: torchscale's weights give results other than those they were trained for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.testing import assert_close

from longnet_dist import Pattern
from longnet_dist.models.torchscale import decoder_from_state_dict, encoder_from_state_dict
from longnet_dist.nn.zero_rows import zero_row_attention

BRANCHES = [
    ((4, 12), (1, 2)),
    ((8, 32, 64), (1, 4, 8)),
    ((5, 7, 50), (1, 3, 4)),
    ((6, 10, 27), (4, 3, 8)),
    ((3,), (3,)),
]
"""With rates that divide segments, and rates that do not."""


def published_attention(q: Tensor, k: Tensor, v: Tensor, lengths, rates, causal=False) -> Tensor:
    """The published method, row by row and with its zero rows, on (N, H, D)."""
    N, H, D = q.shape
    outs, lses = torch.zeros(len(rates), N, H, D, dtype=q.dtype), torch.full((len(rates), N, H), -1e8, dtype=q.dtype)
    for i, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        w = min(w, N)
        filled = -(-w // r) * r
        for segment in range(-(-N // w)):
            for h in range(H):
                parts = [x[segment * w : segment * w + w, h] for x in (q, k, v)]
                rows = [torch.cat([part, part.new_zeros(filled - len(part), D)]) for part in parts]
                phase = h // -(-H // r)
                qs, ks, vs = (x[phase::r] for x in rows)
                scores = qs @ ks.T / math.sqrt(D)
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                for j, row in enumerate(scores):
                    place = segment * filled + phase + j * r
                    if place < N:
                        lse = row.logsumexp(0)
                        outs[i, place, h] = row.softmax(0) @ vs
                        lses[i, place, h] = -1e8 if lse == 0 else lse
    return (lses.softmax(0)[..., None] * outs).sum(0)


@settings(deadline=None, max_examples=30)
@given(branches=st.sampled_from(BRANCHES), N=st.integers(1, 90), H=st.integers(1, 5), causal=st.booleans())
def test_attention_is_the_published_one(branches, N, H, causal):
    q, k, v = torch.randn(3, 2, N, H, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(N)).unbind()
    out = zero_row_attention(q, k, v, Pattern(*branches, "blocked"), causal=causal)
    expected = torch.stack([published_attention(*x, *branches, causal) for x in zip(q, k, v, strict=True)])
    assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "N", [300, pytest.param(1000, marks=pytest.mark.slow), pytest.param(5000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("branches", [((64, 100, 257), (1, 3, 8)), ((128, 512), (2, 4))])
def test_long_sequences(branches, N):
    q, k, v = torch.randn(3, N, 3, 4, dtype=torch.float64).unbind()
    out = zero_row_attention(q[None], k[None], v[None], Pattern(*branches, "blocked"))
    assert_close(out[0], published_attention(q, k, v, *branches), rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [1, 3, 4, 9])
def test_an_lse_of_0_does_not_count(N):
    """A head with one kept key of score 0 has lse 0; if no branch counts, the published method averages them."""
    q = k = torch.zeros(N, 4, 4, dtype=torch.float64)
    v = torch.randn(N, 4, 4, dtype=torch.float64)
    for branches in [((9, 9), (1, 9)), ((4, 4), (4, 4)), ((1, 4), (1, 2))]:
        out = zero_row_attention(q[None], k[None], v[None], Pattern(*branches, "blocked"))
        assert_close(out[0], published_attention(q, k, v, *branches), rtol=0, atol=1e-12)


@pytest.mark.parametrize("branches", [BRANCHES[1], BRANCHES[3]])
def test_gradients_are_those_of_the_published_forward(branches):
    """With the mixing weights' part, which torchscale leaves out."""
    inputs = torch.randn(3, 37, 3, 4, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(37, 3, 4, dtype=torch.float64)
    out = zero_row_attention(*(x[None] for x in inputs.unbind()), Pattern(*branches, "blocked"))
    (grad,) = torch.autograd.grad(out[0], inputs, dout)
    q, k, v = inputs.unbind()
    (expected,) = torch.autograd.grad(published_attention(q, k, v, *branches), inputs, dout)
    assert_close(grad, expected, rtol=0, atol=1e-11)


def test_each_sequence_of_a_ragged_batch_is_as_if_alone():
    q, k, v = torch.randn(3, 3, 40, 3, 4, dtype=torch.float64).unbind()
    pattern = Pattern((8, 30), (2, 4), "blocked")
    out = zero_row_attention(q, k, v, pattern, lengths=torch.tensor([40, 0, 21]))
    assert_close(out[2:, :21], zero_row_attention(*(x[2:, :21] for x in (q, k, v)), pattern), rtol=0, atol=1e-12)
    assert not out[1].any()
    assert not out[2, 21:].any()
    with pytest.raises(ValueError, match=r"lengths is \[41, 0, 21\]; each must be between 0 and N = 40"):
        zero_row_attention(q, k, v, pattern, lengths=torch.tensor([41, 0, 21]))


def test_autocast():
    q, k, v = torch.randn(3, 1, 40, 3, 8).unbind()
    pattern = Pattern((9, 30), (2, 4), "blocked")  # Rows move.
    with torch.autocast("cpu", torch.bfloat16):
        out = zero_row_attention(q, k, v, pattern)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), zero_row_attention(q, k, v, pattern), rtol=0, atol=0.04)


def weights_of_torchscale(num_layers=2, E=24, F=40, *, xpos_of=None, vocab_size=None, final_norm=True):
    """Random weights in torchscale's naming."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator) * 0.3

    weights = (
        {"embed_tokens.weight": draw(vocab_size, E), "output_projection.weight": draw(vocab_size, E)}
        if vocab_size
        else {}
    )
    for i in range(num_layers):
        shapes = {f"self_attn.{name}_proj": (E, E) for name in ("q", "k", "v", "out")}
        shapes |= {"ffn.fc1": (F, E), "ffn.fc2": (E, F), "self_attn.inner_attn_ln": (E,), "ffn.ffn_layernorm": (F,)}
        shapes |= {"self_attn_layer_norm": (E,), "final_layer_norm": (E,)}
        for name, shape in shapes.items():
            weights |= {f"layers.{i}.{name}.weight": draw(*shape), f"layers.{i}.{name}.bias": draw(shape[0])}
        if xpos_of:
            D = E // xpos_of
            weights[f"layers.{i}.self_attn.xpos.scale"] = (torch.arange(0, D, 2) + 0.4 * D) / (1.4 * D)
    return weights | ({"layer_norm.weight": draw(E), "layer_norm.bias": draw(E)} if final_norm else {})


def published_blocks(x, weights, num_layers, H, branches, *, causal=False, xpos=False):
    """The published layers on (N, E), written from their description."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        if f"{name}.weight" not in weights:  # Without sub-LayerNorm.
            return x
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    for i in range(num_layers):
        at = f"layers.{i}."
        normed = norm(x, at + "self_attn_layer_norm")
        q, k, v = (linear(normed, f"{at}self_attn.{name}_proj").unflatten(-1, (H, -1)) for name in "qkv")
        if xpos:
            q, k = rotated(q, 1), rotated(k, -1)
        attended = published_attention(q, k, v, *branches, causal).flatten(1)
        x = x + linear(norm(attended, at + "self_attn.inner_attn_ln"), at + "self_attn.out_proj")
        hidden = gelu(linear(norm(x, at + "final_layer_norm"), at + "ffn.fc1"))
        x = x + linear(norm(hidden, at + "ffn.ffn_layernorm"), at + "ffn.fc2")
    return norm(x, "layer_norm") if "layer_norm.weight" in weights else x


def rotated(x, sign):
    """xPos as torchscale has it: neighbouring dimensions are a pair, and its middle is N / 2 rounded up."""
    N, _, D = x.shape
    pairs = x.unflatten(-1, (-1, 2))
    number = torch.arange(D // 2, dtype=torch.float64)
    angle = torch.arange(N, dtype=torch.float64)[:, None] / 10000 ** (number / (D // 2))
    power = (torch.arange(N) - -(-N // 2)) / 512
    scale = (((2 * number + 0.4 * D) / (1.4 * D)) ** (sign * power[:, None]))[:, None]
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([(a * cos - b * sin) * scale, (b * cos + a * sin) * scale], -1).flatten(2)


@pytest.mark.parametrize("N", [1, 7, 40])
@pytest.mark.parametrize(("branches", "final_norm"), [(BRANCHES[1], True), (BRANCHES[2], False)])
def test_an_encoder(branches, N, final_norm):
    weights = weights_of_torchscale(final_norm=final_norm)
    encoder = encoder_from_state_dict(weights, num_heads=4, segment_lengths=branches[0], dilation_rates=branches[1])
    x = torch.randn(2, N, 24, dtype=torch.float64)
    expected = torch.stack([published_blocks(row, weights, 2, 4, branches) for row in x])
    assert_close(encoder(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("scale_embedding", [False, True])
def test_a_decoder(xpos, scale_embedding):
    weights, branches = weights_of_torchscale(xpos_of=4 if xpos else None, vocab_size=11), BRANCHES[2]
    options = {"segment_lengths": branches[0], "dilation_rates": branches[1], "scale_embedding": scale_embedding}
    if xpos:  # Heads of 6 dimensions.
        assert weights["layers.0.self_attn.xpos.scale"].shape == (3,)
    model = decoder_from_state_dict(weights, num_heads=4, **options)
    tokens = torch.randint(11, (1, 31))
    x = weights["embed_tokens.weight"][tokens[0]] * (24**0.5 if scale_embedding else 1)
    expected = (
        published_blocks(x, weights, 2, 4, branches, causal=True, xpos=xpos) @ weights["output_projection.weight"].T
    )
    assert_close(model(tokens)[0], expected, rtol=0, atol=1e-11)


def test_every_weight_that_does_not_fit_is_named():
    weights = weights_of_torchscale()
    weights["layers.1.ffn.fc2.bias"] = torch.zeros(3)
    weights["layers.1.moe.weight"] = torch.zeros(3)
    del weights["layers.0.self_attn.inner_attn_ln.bias"]
    options = {"num_heads": 4, "segment_lengths": (8,), "dilation_rates": (1,)}
    with pytest.raises(ValueError, match="the weights are not those of torchscale's encoder") as error:
        encoder_from_state_dict(weights, **options)
    for problem in ("attention.inner_norm.bias is missing", "moe.weight is unexpected", r"fc2.bias is (3,), not (24,)"):
        assert problem in str(error.value)
    with pytest.raises(ValueError, match=r"no layers.0.ffn.fc1.weight .* there are none"):
        encoder_from_state_dict({}, **options)


def multiway_name(name, kind):
    """Return the name that torchscale gives a weight of one of its two kinds."""
    module, _, end = name.rpartition(".")
    return name.replace("ffn.", f"ffn.{kind}.") if "ffn." in name else f"{module}.{kind}.{end}"


def test_multiway_weights_have_two_kinds_of_tokens():
    """Sequences of one kind have the results of that kind's weights; a mixed one has other results than both."""
    kinds = {kind: weights_of_torchscale() for kind in "AB"}
    for x in kinds["B"].values():
        x += 0.1 * torch.randn_like(x)
    both = {multiway_name(name, kind): x for kind, weights in kinds.items() for name, x in weights.items()}
    branches = {"num_heads": 4, "segment_lengths": (8, 32), "dilation_rates": (1, 4)}
    x, second = torch.randn(1, 40, 24, dtype=torch.float64), torch.ones(1, 40, dtype=torch.bool)
    encoder = encoder_from_state_dict(both, **branches)
    alone = [encoder_from_state_dict(weights, **branches)(x) for weights in kinds.values()]
    assert_close(encoder(x), alone[0], rtol=0, atol=1e-12)
    assert_close(encoder(x, token_types=~second), alone[0], rtol=0, atol=1e-12)
    assert_close(encoder(x, token_types=second), alone[1], rtol=0, atol=1e-12)
    mixed = encoder(x, token_types=torch.arange(40)[None] % 2 == 0)
    assert all((mixed - other).abs().max() > 1e-3 for other in alone)


def test_a_multiway_decoder_has_two_kinds_in_its_attention_alone():
    """As torchscale's, whose decoders have norms and feed-forward networks once; their B is used by no published code.

    So a token of the second kind has B's attention, and what is there once otherwise.
    """
    branches, kinds = BRANCHES[1], {kind: weights_of_torchscale(vocab_size=11) for kind in "AB"}
    for name, x in kinds["B"].items():
        if "self_attn." in name:
            x += 0.1 * torch.randn_like(x)
        else:
            x.copy_(kinds["A"][name])
    both = {
        multiway_name(name, kind) if "self_attn." in name else name: x
        for kind, weights in kinds.items()
        for name, x in weights.items()
    }
    options = {"num_heads": 4, "segment_lengths": branches[0], "dilation_rates": branches[1]}
    model, tokens = decoder_from_state_dict(both, **options), torch.randint(11, (1, 31))
    for kind, weights in kinds.items():
        expected = decoder_from_state_dict(weights, **options)(tokens)
        assert_close(model(tokens, token_types=torch.full((1, 31), kind == "B")), expected, rtol=0, atol=1e-12)
    assert (model(tokens, token_types=torch.ones(1, 31, dtype=torch.bool)) - model(tokens)).abs().max() > 1e-3
    del both["layers.1.self_attn.q_proj.B.weight"]
    with pytest.raises(ValueError, match=r"blocks.1.attention.q_proj.B.weight is missing"):
        decoder_from_state_dict(both, **options)


def test_weights_without_sub_layernorm():
    weights = {name: x for name, x in weights_of_torchscale().items() if "_ln" not in name and "ffn_layer" not in name}
    branches, x = BRANCHES[1], torch.randn(1, 40, 24, dtype=torch.float64)
    encoder = encoder_from_state_dict(weights, num_heads=4, segment_lengths=branches[0], dilation_rates=branches[1])
    assert_close(encoder(x)[0], published_blocks(x[0], weights, 2, 4, branches), rtol=0, atol=1e-12)


def test_without_padding_attention_is_exact():
    weights = weights_of_torchscale()
    options = {"num_heads": 4, "segment_lengths": (8, 32), "dilation_rates": (1, 4)}
    x = torch.randn(1, 64, 24, dtype=torch.float64)
    as_trained = encoder_from_state_dict(weights, **options)
    exact = encoder_from_state_dict(weights, padding="none", **options)
    assert_close(as_trained(x), exact(x), rtol=0, atol=1e-12)  # 64 is a multiple of both segments.
    assert (as_trained(x[:, :50]) - exact(x[:, :50])).abs().max() > 1e-3
