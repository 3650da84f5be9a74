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
    with pytest.raises(ValueError, match="is not told of packed documents"):
        model(batch["input_ids"], position_ids=batch["position_ids"])
