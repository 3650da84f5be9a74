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
