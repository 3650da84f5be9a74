"""A failure here means: torchtitan's model with dilated attention is, on one process, not what was asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"  # When torchtitan imports torch's pipelines.
)
PATTERN, SEQ_LEN = Pattern((8, 32), (1, 4)), 40


def debug(family="llama3"):
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.models.qwen3.config_registry import qwen3_debugmodel

    config = {"llama3": llama3_debugmodel, "qwen3": qwen3_debugmodel}[family]()
    config.training.seq_len = SEQ_LEN
    del config.model_spec.model.layers[1:]
    config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=lambda model, **_: model)
    return config


def build(config, **degrees):
    """The model as its `parallelize_fn` leaves it, here of one process."""
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
def test_with_one_dense_branch_it_is_torchtitans_own(family):
    """A branch as long as the sequence, w = N and r = 1: logits and gradients of ScaledDotProductAttention."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    from longnet_dist.integrations.torchtitan import apply

    theirs = debug(family)
    for layer in theirs.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    models = build(apply(debug(family), Pattern((64,), (1,)))), build(theirs)
    tokens, positions = draw()
    mine, right = (model(tokens, positions=positions) for model in models)
    assert_close(mine, right, rtol=0, atol=1e-11)
    weights = torch.randn_like(mine)
    (mine * weights).sum().backward()
    (right * weights).sum().backward()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=0, atol=1e-9)


def test_it_attends_by_the_pattern():
    from longnet_dist.integrations.torchtitan import apply

    tokens, _ = draw()
    logits = [build(apply(debug(), pattern))(tokens) for pattern in (PATTERN, Pattern((64,), (1,)))]
    assert_close(logits[0][:, :8], logits[1][:, :8], rtol=0, atol=2)  # The same weights.
    assert (logits[0][:, 8:] - logits[1][:, 8:]).abs().max() > 1e-3


def test_documents_that_are_packed_are_refused_or_joined_as_was_asked():
    from longnet_dist.integrations.torchtitan import apply

    tokens, positions = draw()
    with pytest.raises(ValueError, match=r"packed documents would see each other.*join_documents=True"):
        build(apply(debug(), PATTERN))(tokens, positions=positions % 13)
    joined = build(apply(debug(), PATTERN, join_documents=True))
    packed = positions % 13
    assert_close(joined(tokens, positions=packed), joined(tokens, positions=positions), rtol=0, atol=0)
    assert torch.equal(packed, positions % 13)
    with pytest.raises(ValueError, match="positions are not contiguous"):
        joined(tokens, positions=positions.flip(1))
    with pytest.raises(ValueError, match="must be of the tokens' shape"):
        joined(tokens, positions=positions[:, 1:])


def test_settings_that_do_not_work_are_refused():
    from longnet_dist.integrations.torchtitan import apply

    config = apply(debug(), PATTERN)
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


def test_what_asks_for_more_than_causal_attention_is_refused():
    from longnet_dist.integrations.torchtitan import apply

    model = build(apply(debug(), PATTERN))
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
    apart = apply(debug(), PATTERN).model_spec.model.build()
    with pytest.raises(ValueError, match=r"has no mesh.*model_spec.parallelize_fn"):
        apart(tokens)


def test_models_that_are_not_plain_are_refused():
    from torchtitan.models.common.attention import VarlenAttention
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
    from torchtitan.models.flux.config_registry import flux_debugmodel
    from torchtitan.models.gpt_oss.config_registry import gpt_oss_debugmodel

    from longnet_dist.integrations.torchtitan import apply

    windowed, bare = debug(), debug()
    windowed.model_spec.model.layers[0].attention.inner_attention = VarlenAttention.Config(window_size=(8, 0))
    bare.model_spec = None
    for config, message in (
        (deepseek_v3_debugmodel(), "each must be GQAttention"),
        (flux_debugmodel(), "must be a decoder"),
        (gpt_oss_debugmodel(), "masks of its own"),
        (windowed, "a sliding window is another pattern"),
        (apply(debug(), PATTERN), "DilatedInnerAttention.Config; it must be one of torchtitan's own"),
        (bare, "no model_spec"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(config, PATTERN)
    with pytest.raises(ValueError, match=r"must be a longnet_dist\.Pattern"):
        apply(debug(), (64, 1))
