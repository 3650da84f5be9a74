"""A failure here means: a gang computes something else from ObjectRefs than from their values, or needs the values."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNetConfig, Pattern

pytestmark = [pytest.mark.launch, pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore")]

PATTERN = Pattern((16, 128), (1, 4))
DOCUMENT = bytes(np.random.default_rng(0).integers(0, 128, 301, np.uint8))


@pytest.fixture(scope="module")
def gang(ray_nodes, tmp_path_factory):
    from longnet_dist.integrations.ray import SequenceParallelGang

    folder = tmp_path_factory.mktemp("exported")
    config = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(32, 512), dilation_rates=(1, 4))
    config.build(dtype=torch.float64).save_pretrained(folder)
    with SequenceParallelGang(3, model=folder, timeout=10) as gang:
        yield gang


def test_references_give_what_their_values_give(gang, tmp_path):
    """Documents of every kind, from the driver and from a task; and q, k and v, of which not all are references."""
    import ray

    @ray.remote(num_cpus=0)
    def read():
        return DOCUMENT

    scores = gang.score(DOCUMENT)
    ids = np.frombuffer(DOCUMENT, np.uint8)
    for value in (DOCUMENT, DOCUMENT.decode(), ids, ids.tolist(), torch.tensor(ids).long(), ids.astype(np.uint16)):
        assert torch.equal(gang.score(ray.put(value)), scores)
    calls = [gang.submit("score", read.remote()), gang.submit("embed", document=read.remote(), pooling="last")]
    assert torch.equal(calls[0].result(), scores)
    assert torch.equal(calls[1].result(), gang.embed(DOCUMENT, pooling="last"))
    assert torch.equal(gang.score(ray.put(b"ab")), gang.score(b"ab"))  # Of three ranks, some have no rows.

    q, k, v = torch.randn(3, 2, 100, 4, 8)
    np.save(tmp_path / "k.npy", k.numpy())
    out = gang.dilated_attention(q, k, v, PATTERN, causal=True)
    for inputs in ((ray.put(q), tmp_path / "k.npy", v), (q.numpy(), ray.put(k.numpy()), ray.put(v))):
        assert torch.equal(gang.dilated_attention(*inputs, PATTERN, causal=True), out)
    half = [x.bfloat16() for x in (q, k, v)]
    assert_close(gang.dilated_attention(*map(ray.put, half), PATTERN), gang.dilated_attention(*half, PATTERN))
    written = gang.dilated_attention(*map(ray.put, (q, k, v)), PATTERN, causal=True, out=tmp_path / "out")
    assert written == tmp_path / "out"
    parts = [np.load(path) for path in sorted(written.glob("*.npy"))]
    assert torch.equal(torch.from_numpy(np.concatenate(parts, 1)), out)


@pytest.mark.slow
def test_a_reference_that_cannot_work_raises(gang, tmp_path):
    """Its value is wrong or a path, or there is none; the gang stays as it is, and a folder stays free."""
    import ray

    @ray.remote(num_cpus=0)
    def nested():
        return ray.put(DOCUMENT)

    @ray.remote(num_cpus=0, max_retries=0)
    def fail():
        raise KeyError("lost")

    @ray.remote(resources={"nothing has this": 1})
    def never():
        return DOCUMENT

    formed, q = gang.stats()["formed"], torch.ones(1, 20, 2, 4)
    mistakes = [
        (lambda: gang.score(ray.put(None)), "the document is None; it must be text"),
        (lambda: gang.score(ray.put([1.5, 2.0])), "token ids are float64; they must be integers"),
        (lambda: gang.score(ray.put([5, 999])), "token ids of rows .* 999"),
        (lambda: gang.embed(ray.put(np.ones((2, 3), int))), r"has shape \(2, 3\); it must be one sequence"),
        (lambda: gang.score(ray.put(b""), out=tmp_path / "out"), "at least one token"),
        (lambda: gang.score(ray.put(Path("/etc/hosts"))), "an ObjectRef holds the path /etc/hosts; give the path"),
        (lambda: gang.dilated_attention(ray.put("q.npy"), q, q, PATTERN), "an ObjectRef holds the path q.npy"),
        (lambda: gang.score(nested.remote()), "an ObjectRef holds another ObjectRef; give the inner one"),
        (lambda: gang.score([ray.put(5), ray.put(6)]), "is a sequence of ObjectRefs; it must be one ObjectRef"),
        (lambda: gang.score(fail.remote()), r"an ObjectRef of score has no value \(KeyError: 'lost'\); give one"),
        (lambda: gang.score(never.remote()), "the ObjectRefs of score have no values after 10 s: do their tasks wait"),
        (lambda: gang.dilated_attention(ray.put(q), q[:, 1:], q, PATTERN), "with the same N"),
        (lambda: gang.dilated_attention(ray.put(q), q, q, PATTERN, dropout=1), r"\['dropout'\] are not known"),
        (lambda: gang.dilated_attention(ray.put(q), q, q, ray.put(PATTERN)), "pattern is ObjectRef.*a longnet_dist.P"),
        (lambda: gang.dilated_attention(ray.put(q), tmp_path / "no.npy", q, PATTERN), "no such file"),
        (lambda: gang.embed(ray.put(DOCUMENT), pooling="max"), "pooling is 'max'"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(ValueError, match=message) as caught:
            mistake()
        assert not re.search(r"\n|Traceback", str(caught.value))
    assert gang.score(ray.put(DOCUMENT), out=tmp_path / "out") == tmp_path / "out"
    assert gang.stats()["formed"] == formed


@pytest.mark.slow
def test_a_call_of_references_is_retried_after_the_loss_of_a_rank(gang):
    import ray

    q, k, v = torch.randn(3, 1, 6000, 4, 8)
    dense, formed, failed = Pattern((6000,), (1,)), gang.stats()["formed"], gang.stats()["failed"]
    for _ in range(2):  # The first call starts the process that splits, too.
        start = time.monotonic()
        expected = gang.dilated_attention(*map(ray.put, (q, k, v)), dense, kernel="eager")
    duration = time.monotonic() - start
    gang.retries = 1
    call = gang.submit("dilated_attention", *map(ray.put, (q, k, v)), dense, kernel="eager")
    pid = gang.stats()["ranks"][1]["pid"]
    time.sleep(duration / 2)  # The rank computes then.
    os.kill(pid, signal.SIGKILL)
    assert torch.equal(call.result(), expected)
    gang.retries = 0
    assert (gang.stats()["formed"], gang.stats()["failed"]) == (formed + 1, failed + 1)
