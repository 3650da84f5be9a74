"""A failure here means: on one process, a torchtitan model does not compute the dilated attention of its pattern."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"  # torchtitan imports torch's pipelines.
)
pytest.importorskip("torchtitan")
PATTERN, SEQ_LEN = Pattern((8, 32), (1, 4)), 40


def make_config(family="llama3"):
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_debugmodel

    config = {"llama3": llama3_debugmodel, "qwen3": qwen3_debugmodel}[family]()
    config.training.seq_len = SEQ_LEN
    del config.model_spec.model.layers[1:]
    config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=lambda model, **_: model)
    return config


def build(config, **degrees):
    """Build the model on one process, and call its `parallelize_fn`."""
    from torchtitan.distributed import ParallelDims

    sizes = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1} | degrees
    sizes["world_size"] = sizes["pp"]
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    torch.manual_seed(0)
    model = spec.model.build().double()
    model.init_weights()
    dims = ParallelDims(**sizes)
    return spec.parallelize_fn(model, parallel_dims=dims, training=config.training, parallelism=config.parallelism)


def draw():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2048, (2, SEQ_LEN), generator=generator), torch.arange(SEQ_LEN).repeat(2, 1)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_one_dense_branch_is_torchtitans_own_attention(family):
    """A branch with w >= N and r = 1 has the logits and gradients of ScaledDotProductAttention."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    from longnet_dist.integrations.torchtitan import apply

    dense = make_config(family)
    for layer in dense.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    models = build(apply(make_config(family), Pattern((64,), (1,)))), build(dense)
    tokens, positions = draw()
    logits, expected = (model(tokens, positions=positions) for model in models)
    assert_close(logits, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=0, atol=1e-9)


def test_the_pattern_decides_what_a_token_sees():
    from longnet_dist.integrations.torchtitan import apply

    tokens, _ = draw()
    logits = [build(apply(make_config(), pattern))(tokens) for pattern in (PATTERN, Pattern((64,), (1,)))]
    assert_close(logits[0][:, :8], logits[1][:, :8], rtol=0, atol=2)  # The same weights.
    assert (logits[0][:, 8:] - logits[1][:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointed", [True, False])
def test_packed_documents_are_computed_alone(checkpointed):
    """Positions begin anew with each document, at other places in each sequence; the same for a later recomputation."""
    from torch.utils.checkpoint import checkpoint

    from longnet_dist.integrations.torchtitan import apply

    model = build(apply(make_config(), PATTERN))
    if checkpointed:
        for layer in model.layers.values():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    tokens, positions = draw()
    positions = torch.stack([positions[0] % 13, positions[1] % 17])
    logits = model(tokens, positions=positions)
    model(tokens, positions=torch.arange(SEQ_LEN).repeat(2, 1))  # Its documents are not those of the backward below.
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, period in enumerate((13, 17)):
        for first in range(0, SEQ_LEN, period):
            part = slice(first, first + period)
            alone = model(tokens[row : row + 1, part])
            assert_close(logits[row : row + 1, part], alone, rtol=0, atol=1e-11)
            (alone * weights[row : row + 1, part]).sum().backward()
    for grad, p in zip(grads, model.parameters(), strict=True):
        assert_close(grad, p.grad, rtol=0, atol=1e-9)


def test_packed_documents_can_be_joined():
    from longnet_dist.integrations.torchtitan import apply

    tokens, positions = draw()
    joined = build(apply(make_config(), PATTERN, join_documents=True))
    packed = positions % 13
    assert_close(joined(tokens, positions=packed), joined(tokens, positions=positions), rtol=0, atol=0)
    assert torch.equal(packed, positions % 13)
    with pytest.raises(ValueError, match="positions are not contiguous"):
        joined(tokens, positions=positions.flip(1))
    with pytest.raises(ValueError, match="must be of the tokens' shape"):
        joined(tokens, positions=positions[:, 1:])


def test_settings_that_do_not_work_raise():
    from longnet_dist.integrations.torchtitan import apply

    config = apply(make_config(), PATTERN)
    assert config.parallelism.context_parallel_load_balancer is None
    with pytest.raises(ValueError, match="pipeline_parallel_degree is 2"):
        build(config, pp=2)
    config.parallelism.spmd_backend = "partial_dtensor"
    with pytest.raises(ValueError, match="partial_dtensor"):
        build(config)
    config.parallelism.spmd_backend = "spmd_types"
    config.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match="disable_cuda_graphs"):
        build(config)


def test_more_than_causal_attention_raises():
    from longnet_dist.integrations.torchtitan import apply

    model = build(apply(make_config(), PATTERN))
    tokens, positions = draw()
    with pytest.raises(ValueError, match="attention_masks, and the pattern says which keys a query sees"):
        model(tokens, positions, object())
    attention = model.layers["0"].attention.inner_attention
    q = torch.zeros(1, SEQ_LEN, 2, 8)
    for option, message in (
        ({"score_mod": print}, "score_mod"),
        ({"out_transform": print}, "sinks"),
        ({"is_causal": False}, "only causal"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, **option)
    without_mesh = apply(make_config(), PATTERN).model_spec.model.build()
    with pytest.raises(ValueError, match=r"has no mesh.*model_spec.parallelize_fn"):
        without_mesh(tokens)


def test_models_that_are_not_plain_raise():
    from torchtitan.models.common.attention import VarlenAttention
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
    from torchtitan.models.flux.config_registry import flux_debugmodel
    from torchtitan.models.gpt_oss.config_registry import gpt_oss_debugmodel

    from longnet_dist.integrations.torchtitan import apply

    windowed, without_model = make_config(), make_config()
    windowed.model_spec.model.layers[0].attention.inner_attention = VarlenAttention.Config(window_size=(8, 0))
    without_model.model_spec = None
    for config, message in (
        (deepseek_v3_debugmodel(), "each must be GQAttention"),
        (flux_debugmodel(), "must be a decoder"),
        (gpt_oss_debugmodel(), "masks of its own"),
        (windowed, "a sliding window is another pattern"),
        (apply(make_config(), PATTERN), "DilatedInnerAttention.Config; it must be one of torchtitan's own"),
        (without_model, "no model_spec"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(config, PATTERN)
    with pytest.raises(ValueError, match=r"must be a longnet_dist\.Pattern"):
        apply(make_config(), (64, 1))
