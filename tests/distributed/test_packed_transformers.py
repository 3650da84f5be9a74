"""A failure here means: documents that are packed for a transformers model see each other, or other positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from longnet_dist import SequenceMesh
from tests.distributed.test_transformers import PATTERN, draw, make_model

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENTS = [0, 13, 14, 40]
OFFSETS = "cu_seq_lens_q"


def pack(rows=40):
    """A batch as transformers' DataCollatorWithFlattening makes it, and its documents alone."""
    from transformers import DataCollatorWithFlattening

    tokens = draw(rows)["input_ids"][0]
    alone = [tokens[a:b] for a, b in itertools.pairwise(DOCUMENTS)]
    features = [{"input_ids": document.tolist(), "labels": document.tolist()} for document in alone]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features), alone


def logits_of_packed(group, family, described_by):
    """Return logits, loss and gradients of packed documents, and those of each document alone."""
    from longnet_dist.integrations.transformers import split_batch

    batch, alone = pack()
    kept = {"positions": ("position_ids",), "offsets": ("cu_seq_lens_q",), "both": batch.keys()}[described_by]
    batch = {name: x for name, x in batch.items() if name in ("input_ids", "labels", *kept)}
    mesh = None if group is None else SequenceMesh(group, PATTERN, 40)
    model = make_model(family, PATTERN, mesh)
    result = model(**split_batch(batch, mesh))
    result.loss.backward()
    join, add = (lambda x: x, lambda x: x) if mesh is None else (mesh.join, mesh.sum)
    packed = [join(result.logits).detach(), result.loss.detach(), *(add(p.grad) for p in model.parameters())]
    reference = make_model(family)
    logits = torch.cat([reference(document[None]).logits for document in alone], dim=1)
    targets = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in alone])
    loss = torch.nn.functional.cross_entropy(logits[0], targets)
    loss.backward()
    return packed, [logits.detach(), loss.detach(), *(p.grad for p in reference.parameters())]


@pytest.mark.parametrize("described_by", ["positions", "offsets", "both"])
@pytest.mark.parametrize(("world", "family"), [(0, "llama"), (0, "gpt_neox"), (2, "qwen3"), (4, "llama")])
def test_packed_documents_are_attended_each_alone(pool, world, family, described_by):
    results = [logits_of_packed(None, family, described_by)]
    if world:
        results = pool.run(world, logits_of_packed, family, described_by)
    for packed, alone in results:
        for actual, expected in zip(packed, alone, strict=True):
            assert_close(actual.detach(), expected, rtol=0, atol=1e-11)


def test_packed_documents_without_split_batch():
    """On one process the model takes what the collator makes; the stock Trainer passes it like that."""
    batch, alone = pack()
    model = make_model("llama")
    expected = torch.cat([model(document[None]).logits for document in alone], dim=1)
    for names in (("position_ids",), ("cu_seq_lens_q",), batch.keys()):
        inputs = {name: x for name, x in batch.items() if name in names and name not in ("input_ids", "labels")}
        assert_close(model(batch["input_ids"], **inputs).logits, expected, rtol=0, atol=1e-11)
    assert_close(model(alone[2][None]).logits, expected[:, 14:], rtol=0, atol=1e-11)


def test_a_model_that_does_not_pass_the_documents_on_raises(monkeypatch):
    batch, _ = pack()
    model = make_model("llama")
    for layer in model.model.layers:
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda *a, forward=forward, **o: forward(*a, **(o | {"cu_seq_lens_q": None}))
        )
    with pytest.raises(ValueError, match="is not told of documents or padding"):
        model(batch["input_ids"], position_ids=batch["position_ids"])


def ragged(packed):
    """A batch whose sequences are padded before, after, at both ends, and not; if `packed`, one holds two documents."""
    tokens = torch.cat([draw(40)["input_ids"], draw(41)["input_ids"][:, :40]])
    documents = [[(7, 40)], [(0, 35)], [(3, 37)], [(0, 11), (11, 40)] if packed else [(0, 40)]]
    mask, positions = torch.zeros(4, 40, dtype=torch.int64), torch.zeros(4, 40, dtype=torch.int64)
    for row, of_row in enumerate(documents):
        for a, b in of_row:
            mask[row, a:b], positions[row, a:b] = 1, torch.arange(b - a)
    labels = tokens.masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    batch |= {"position_ids": positions} if packed else {}
    return batch, [(row, a, b) for row, of_row in enumerate(documents) for a, b in of_row]


def logits_of_ragged(group, family, packed, with_split_batch):
    """Return logits of tokens, loss and gradients of ragged sequences, and those of each document alone."""
    from longnet_dist.integrations.transformers import split_batch

    batch, documents = ragged(packed)
    mesh = None if group is None else SequenceMesh(group, PATTERN, 40)
    model = make_model(family, PATTERN, mesh)
    result = model(**(split_batch(batch, mesh) if with_split_batch else batch))
    result.loss.backward()
    join, add = (lambda x: x, lambda x: x) if mesh is None else (mesh.join, mesh.sum)
    logits = join(result.logits).detach()
    found = torch.cat([logits[row, a:b] for row, a, b in documents])
    reference, losses, expected = make_model(family), [], []
    for row, a, b in documents:
        document = batch["input_ids"][row, a:b]
        expected.append(reference(document[None]).logits[0])
        losses.append(torch.nn.functional.cross_entropy(expected[-1][:-1], document[1:], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    packed = [found, result.loss.detach(), *(add(p.grad) for p in model.parameters())]
    return packed, [torch.cat(expected).detach(), loss.detach(), *(p.grad for p in reference.parameters())]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("world", "family"), [(0, "llama"), (0, "gpt_neox"), (2, "qwen3"), (4, "llama")])
def test_padding_on_any_side_and_documents_at_any_place_are_exact(pool, world, family, packed):
    """On one process, with and without split_batch."""
    results = [] if world else [logits_of_ragged(None, family, packed, split) for split in (True, False)]
    for found, alone in results or pool.run(world, logits_of_ragged, family, packed, True):
        for actual, expected in zip(found, alone, strict=True):
            assert_close(actual, expected, rtol=0, atol=1e-11)


def test_generation_from_prompts_that_are_padded_before_tokens():
    model = make_model("llama").eval()
    prompts = [draw(20)["input_ids"][0], draw(13)["input_ids"][0]]
    tokens = torch.stack([torch.nn.functional.pad(prompt, (20 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(prompt), (20 - len(prompt), 0)) for prompt in prompts])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    batched = model.generate(tokens, attention_mask=mask, **options)
    for row, prompt in zip(batched, prompts, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert row[20:].tolist() == alone[0, len(prompt) :].tolist()


def test_layers_that_are_computed_again_have_their_own_documents():
    """Gradient checkpointing runs layers again after another forward, which had other documents or none."""
    batch, _ = pack()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    grads = []
    for checkpointing in (False, True):
        model = make_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**inputs).logits.square().sum()
        other = model(draw(30)["input_ids"]).logits.square().sum()
        (loss + other).backward()
        grads.append([p.grad for p in model.parameters()])
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, rtol=0, atol=1e-11)


def results_of_offsets_by_sequence(group):
    """Return logits of sequences whose documents are given by `cu_seq_lens_q` (B, documents + 1), and those alone."""
    from longnet_dist.integrations.transformers import split_batch

    tokens, offsets = draw(40)["input_ids"], torch.tensor([DOCUMENTS, [0, 30, 40, 40]])
    mesh = SequenceMesh(group, PATTERN, 40)
    logits = make_model("llama", PATTERN, mesh)(**split_batch({"input_ids": tokens, OFFSETS: offsets}, mesh)).logits
    reference = make_model("llama")
    spans = [(row, *span) for row, of_row in enumerate(offsets.tolist()) for span in itertools.pairwise(of_row)]
    alone = [reference(tokens[row : row + 1, a:b]).logits[0] for row, a, b in spans if a < b]
    return mesh.join(logits).flatten(0, 1).detach(), torch.cat(alone).detach()


def test_each_sequence_may_have_offsets_of_its_own(pool):
    for actual, expected in pool.run(2, results_of_offsets_by_sequence):
        assert_close(actual, expected, rtol=0, atol=1e-11)


def test_padding_between_documents_is_exact_if_positions_begin_anew_behind_it():
    model, tokens = make_model("llama"), draw(40)["input_ids"][:1]
    mask = torch.ones_like(tokens)
    mask[0, 10:16] = 0
    positions = torch.cat([torch.arange(16), torch.arange(24)])[None]
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    for span in (slice(0, 10), slice(16, 40)):
        assert_close(logits[:, span], model(tokens[:, span]).logits, rtol=0, atol=1e-11)


def test_absolute_positions_count_from_the_first_token():
    import transformers

    from longnet_dist.integrations.transformers import apply

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64, "use_cache": False}
    config = transformers.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = apply(transformers.AutoModelForCausalLM.from_config(config).double(), PATTERN)
    tokens = draw(40)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert_close(logits[:1, 11:], model(tokens[:1, 11:]).logits, rtol=0, atol=1e-11)


def gradients_of_two_forwards(group, use_reentrant):
    """Return gradients of forwards with and without documents before one backward, plain and checkpointed."""
    from longnet_dist.integrations.transformers import split_batch

    mesh = SequenceMesh(group, PATTERN, 40)
    batches = [split_batch(batch, mesh) for batch in (ragged(packed=True)[0], draw(40))]
    grads = []
    for checkpointing in (False, True):
        model = make_model("llama", PATTERN, mesh).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        sum(model(**batch).loss for batch in batches).backward()
        grads.append([p.grad for p in model.parameters()])
    return grads


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_have_their_own_documents_on_each_rank(pool, use_reentrant):
    for plain, checkpointed in pool.run(2, gradients_of_two_forwards, use_reentrant):
        for actual, expected in zip(checkpointed, plain, strict=True):
            assert_close(actual, expected, rtol=0, atol=1e-11)
