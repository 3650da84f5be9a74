"""A failure here means: a transformers model across ranks differs from one process, or its attention is wrong."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import Pattern, SequenceMesh

pytestmark = pytest.mark.filterwarnings("ignore")
PATTERN = Pattern((8, 64), (1, 4))
FAMILIES = ("llama", "qwen3", "gpt_neox")


def make_model(family, pattern=PATTERN, mesh=None, **changes):
    """Make a tiny model of a family from its config, in float64."""
    import transformers

    from longnet_dist.integrations.transformers import apply

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "use_cache": False}
    kv = {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    head = {"head_dim": 4} if family == "qwen3" else {}
    config_class = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "gpt_neox": "GPTNeoXConfig"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(sizes | kv | head | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    return model if pattern is None else apply(model, pattern, mesh)


def draw(rows, padded=0):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(50, (2, rows), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}
    if padded:
        batch["labels"][1, -padded:] = -100
        batch["attention_mask"][1, -padded:] = 0
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_one_dense_branch_is_transformers_own_attention(family):
    """A branch with w >= N and r = 1 has the logits and the loss of eager attention."""
    batch = draw(40)
    dilated, dense = make_model(family, Pattern((64,), (1,))), make_model(family, None)
    dense.set_attn_implementation("eager")
    result, expected = dilated(**batch), dense(**batch)
    assert_close(result.logits, expected.logits, rtol=0, atol=1e-6)  # GPT-NeoX's eager softmax is in float32.
    assert_close(result.loss.double(), expected.loss.double(), rtol=0, atol=1e-6)


def compare_with_one_process(group, family, rows, padded, compiled=False):
    """Compare logits, loss and the sum of gradients."""
    from longnet_dist.integrations.transformers import split_batch

    batch = draw(rows, padded)
    whole = make_model(family)
    expected = whole(**split_batch(batch, None))
    expected.loss.backward()
    mesh = SequenceMesh(group, PATTERN, rows)
    model = make_model(family, PATTERN, mesh)
    if compiled:
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # Dynamo looks at it.
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
    local = split_batch(batch, mesh)
    for inputs in (local, {name: x for name, x in local.items() if name != "position_ids"}):
        model.zero_grad()
        result = model(**inputs)
        result.loss.backward()
        valid = batch["attention_mask"].bool()
        assert_close(mesh.join(result.logits)[valid], expected.logits[valid], rtol=0, atol=1e-11)
        assert_close(result.loss, expected.loss, rtol=0, atol=1e-11)
        for (name, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
            grad = mesh.sum(parameter.grad)
            assert_close(grad, reference.grad, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("world", "rows", "padded"), [(1, 40, 0), (2, 61, 0), (2, 64, 9), (4, 50, 30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_process_does(pool, family, world, rows, padded):
    pool.run(world, compare_with_one_process, family, rows, padded)


def test_compiled_layers_compute_the_same(pool):
    pool.run(2, compare_with_one_process, "llama", 61, 0, True, limit=200)


def errors(group):
    """Check that each wrong use raises the documented error on every rank, and that none hangs."""
    from longnet_dist.integrations.transformers import split_batch

    mesh = SequenceMesh(group, PATTERN, 40)
    model, batch = make_model("llama", PATTERN, mesh), draw(40)
    local = split_batch(batch, mesh)
    hole = draw(40)
    hole["attention_mask"][0, 5:9] = 0
    wrong_on_one_rank = mesh.positions()[None] + int(mesh.rank == 0)
    cases = [
        (batch, "split_batch"),  # Not split.
        (local | {"position_ids": wrong_on_one_rank}, "position_ids must count from 0"),
        (
            local | {"position_ids": torch.arange(mesh.shard.num_rows)[None] + 1},
            "Across ranks they are those of split_b",
        ),
        (local | {"cu_seq_lens_q": torch.tensor([0, 7, 40])}, "position_ids must count from 0"),
        (local | {"cu_seq_lens_q": torch.tensor([0, 7, 20])}, "its last one N = 40"),
        (local | {"attention_mask": mesh.split(hole["attention_mask"])}, "padding between the tokens"),
        ({name: x for name, x in local.items() if name != "shift_labels"}, "shifted before they are split"),
        (local | {"attention_mask": torch.ones(2, 1, 40, 40)}, r"must be \(B, N\)"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        make_model("llama", PATTERN, mesh, attention_dropout=0.1).train()(**local)
    jumps = {"position_ids": torch.stack([torch.arange(40) + 1, torch.arange(40)])}
    of_another_rank = {"input_ids": batch["input_ids"] + int(mesh.rank == 1)}
    for wrong_batch, message in (
        (batch | jumps, "must count from 0, and begin anew"),
        (batch | (jumps if mesh.rank == 0 else {}), "must count from 0, and begin anew"),
        (batch | of_another_rank, "the ranks of one sequence disagree.*the batch"),
        (hole, "padding between the tokens of a document"),
        (batch | {"attention_mask": 2 * torch.ones(2, 40)}, "1 for tokens and 0 for padding"),
        (batch | {"cu_seq_lens_q": torch.tensor([[0, 40]] * 3)}, "each needs a row"),
        (draw(41), "the batch is of 41 tokens, and the mesh of seq_len = 40"),
        (batch | {"cu_seq_lens_q": torch.tensor([0, 39])}, "its last one N = 40"),
        (batch | {"cu_seq_lens_q": torch.tensor([0.0, 40.0])}, "a tensor of integers"),
        (batch | {"cu_seq_lens_q": torch.tensor([0, 40]), "cu_seq_lens_k": torch.tensor([0, 9, 40])}, "differ"),
        (batch | {"seq_idx": torch.zeros(2, 40)}, "seq_idx, which is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            split_batch(wrong_batch, mesh)


def test_what_cannot_be_exact_raises_on_every_rank(pool):
    pool.run(2, errors)


def unsupported_models(group):
    """Check that models raise if a part of them would see only one rank's rows."""
    import transformers

    from longnet_dist.integrations.transformers import apply

    mesh = SequenceMesh(group, PATTERN, 40)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    ropes = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    long = ropes | {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    cases = [
        ("Llama", {"rope_parameters": ropes | {"rope_type": "dynamic"}}, "rotary positions of the kind dynamic"),
        ("Llama", {"rope_parameters": long}, "rotary positions of the kind longrope"),
        ("Mixtral", {"output_router_logits": True, "num_local_experts": 2}, "adds a loss of its routers"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, r"has layers \(conv\) that would see"),
    ]
    for name, options, message in cases:
        config = getattr(transformers, f"{name}Config")(**(sizes | options))
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        apply(model, PATTERN)  # On one process it is exact.
        with pytest.raises(ValueError, match=message):
            apply(model, PATTERN, mesh)
    with pytest.raises(ValueError, match=r"a rank that holds no rows, .*chunk=20"):
        make_model("llama", PATTERN, SequenceMesh(group, PATTERN, 40, chunk=40))
    model = make_model("llama", PATTERN, SequenceMesh(group, PATTERN, 30))
    # A second call replaces the mesh of the first.
    apply(model, PATTERN, mesh)(**{"input_ids": mesh.split(draw(40)["input_ids"])})


def test_models_that_cannot_be_split_raise(pool):
    pool.run(2, unsupported_models)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Gemma2", {"head_dim": 4}, "softcap = 50.0, and scores are not capped"),
        ("GptOss", {"head_dim": 4, "num_local_experts": 2}, "s_aux, and attention sinks are not computed"),
        ("Mistral", {}, "sliding_window = 8, and a sliding window is another pattern"),
    ],
)
def test_unsupported_options_of_an_attention_raise(name, options, message, monkeypatch):
    """Each option raises for its own reason. The mask is replaced, because it would raise for windows first."""
    import transformers

    from longnet_dist.integrations.transformers import apply

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    if name != "Mistral":
        sizes |= {"layer_types": ["full_attention"] * 2}
    config = getattr(transformers, f"{name}Config")(**(sizes | options))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    module = importlib.import_module("longnet_dist.integrations.transformers")
    monkeypatch.setattr(module, "_mask", lambda *_, **__: None)
    with pytest.raises(ValueError, match=message):
        apply(model, PATTERN)(draw(40)["input_ids"])


def test_wrong_uses_raise_on_one_process():
    import transformers

    from longnet_dist.integrations.transformers import apply, register

    batch = draw(40)
    positions = torch.stack([torch.arange(40) + 1, torch.arange(40)])
    with pytest.raises(ValueError, match="position_ids must count from 0"):
        make_model("llama")(batch["input_ids"], position_ids=positions)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    mistral = transformers.MistralConfig(**sizes, vocab_size=50, num_hidden_layers=1, sliding_window=8)
    with pytest.raises(ValueError, match="sliding window"):
        apply(transformers.MistralForCausalLM(mistral), PATTERN)(batch["input_ids"])
    with pytest.raises(ValueError, match=r"block_tables, which is not known here"):
        make_model("llama")(batch["input_ids"], block_tables=torch.zeros(2))
    falcon = transformers.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="does not call transformers' attention interface"):
        apply(transformers.FalconForCausalLM(falcon), PATTERN)
    tagger = transformers.LlamaForTokenClassification(make_model("llama", None).config)
    with pytest.raises(ValueError, match="is not the causal language model of its kind"):
        apply(tagger, PATTERN)
    with pytest.raises(ValueError, match="is no PreTrainedModel"):
        apply(torch.nn.Sequential(make_model("llama", None)), PATTERN)
    register()
    plain = make_model("llama", None)
    plain.set_attn_implementation("longnet_dist")
    with pytest.raises(ValueError, match=r"has no pattern: call .*apply\(model, pattern\)"):
        plain(batch["input_ids"])
    with pytest.raises(ValueError, match="the mesh is of the pattern"):
        apply(make_model("llama", None), PATTERN, SequenceMesh(None, Pattern((16,), (1,)), 40))


def test_generate_is_exact_without_a_cache_and_raises_with_one():
    model = make_model("llama").eval()
    tokens = draw(20)["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    generated = model.generate(tokens, use_cache=False, **options)
    expected = tokens
    for _ in range(5):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert generated.tolist() == expected.tolist()
    from transformers import DynamicCache

    with pytest.raises(ValueError, match=r"only DilatedPast is supported.*use_cache=False"):
        model.generate(tokens, cache=DynamicCache(), **options)


def test_a_model_that_was_saved_and_loaded_again_needs_apply_alone(tmp_path):
    """Its config holds the pattern. Until apply is called it raises, and never attends by another attention."""
    import transformers

    from longnet_dist.integrations.transformers import apply

    model = make_model("llama").eval()
    tokens = torch.randint(50, (1, 40))
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(expected.dtype)
    with pytest.raises(ValueError, match=r"of a model that was loaded: call .*apply\(model\)"):
        loaded(tokens)
    torch.testing.assert_close(apply(loaded)(tokens).logits, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="has no pattern in its config"):
        apply(make_model("llama", None))


def test_rotary_frequencies_that_were_cast_are_refused():
    """In bfloat16 the angle at position 30,000 is off by radians."""
    from longnet_dist.integrations.transformers import apply

    with pytest.raises(ValueError, match=r"rotary frequencies in torch\.bfloat16"):
        apply(make_model("llama", None).to(torch.bfloat16), PATTERN)


def test_multi_head_latent_attention_is_refused_by_apply():
    import transformers

    from longnet_dist.integrations.transformers import apply

    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="multi-head latent attention"):
        apply(transformers.DeepseekV3ForCausalLM(config), PATTERN)


def generate_with_a_mesh(group):
    from longnet_dist.integrations.transformers import apply

    model = make_model("llama", mesh=SequenceMesh(group, PATTERN, 40)).eval()
    with pytest.raises(ValueError, match="generate needs whole sequences"):
        model.generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2, use_cache=False)
    return apply(model).generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2, use_cache=False).shape[1]


def test_generate_says_what_is_wrong_with_a_mesh(pool):
    assert pool.run(2, generate_with_a_mesh) == [6, 6]


def test_peft_comes_after_apply():
    """LoRA trains on top of dilated attention; a model that PEFT has wrapped is refused."""
    import peft

    from longnet_dist.integrations.transformers import apply

    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    plain = make_model("llama")
    batch = draw(40)
    expected = plain(**batch).loss
    wrapped = peft.get_peft_model(plain, lora)
    assert_close(wrapped(**batch).loss, expected, rtol=0, atol=1e-12)
    wrapped(**batch).loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora_B" in name)
    with pytest.raises(ValueError, match="apply to the model itself, before it is wrapped"):
        apply(wrapped, PATTERN)


def test_sequences_that_are_longer_than_every_segment_are_said_once():
    model = make_model("llama", Pattern((8, 16), (1, 2)))
    with pytest.warns(UserWarning, match="no token sees further than 16 tokens, and sequences have 40"):
        model(**draw(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**draw(40))
