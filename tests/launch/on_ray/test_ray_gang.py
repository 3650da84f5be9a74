"""A failure here means: a gang of Ray actors gives a wrong answer or none, or does not survive the loss of a rank."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNet, LongNetConfig, Pattern, dense_reference, next_token_labels
from longnet_dist.models.loss import linear_token_losses
from tests.launch.jobs import ROOT

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

PATTERN = Pattern((16, 128), (1, 4))
DOCUMENT = bytes(np.random.default_rng(0).integers(0, 256, 301, np.uint8))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model's folder, and the log-likelihoods and features of the document that one process computes."""
    config = LongNetConfig(d_model=16, num_layers=2, num_heads=2, segment_lengths=(32, 512), dilation_rates=(1, 4))
    torch.manual_seed(0)
    model = config.build(dtype=torch.float64).eval()
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    ids = torch.tensor(list(DOCUMENT))[None]
    with torch.no_grad():
        features = model.features(ids)
    losses = linear_token_losses(features, model.output.weight, next_token_labels(ids))
    return folder, -losses[0, :-1], features[0]


def make_gang(nodes, ranks, model=None, **options):
    from longnet_dist.integrations.ray import SequenceParallelGang

    return SequenceParallelGang(ranks, model=model, **({"timeout": 30} | options))


def random_qkv(rows, dtype=torch.float64, heads=(4, 2)):
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, rows, n, 8, dtype=dtype, generator=generator) for n in (heads[0], heads[1], heads[1]))
    return q, k, v


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_gang_equals_the_oracle_and_the_model(ray_nodes, exported, tmp_path, ranks):
    """Attention, scores and embeddings of tensors, text, ids and files, returned and written to files.

    The gang of two ranks then gets wrong arguments, and 200 calls.
    """
    import ray

    folder, scores, features = exported
    (tmp_path / "book.bin").write_bytes(DOCUMENT)
    ids = np.frombuffer(DOCUMENT, np.uint8)
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    np.save(tmp_path / "unsigned.npy", ids.astype(np.uint16))
    with make_gang(ray_nodes, ranks, folder) as gang:
        for rows, causal in ((100, True), (61, False), (3, True)):
            q, k, v = random_qkv(rows)
            out = gang.dilated_attention(q, k, v, PATTERN, causal=causal)
            assert_close(out, dense_reference(q, k, v, PATTERN, causal=causal), rtol=0, atol=1e-12)
        paths = []
        for name, x in zip("qkv", (q, k, v), strict=True):
            paths.append(tmp_path / f"{name}.npy")
            np.save(paths[-1], x.numpy())
        written = gang.dilated_attention(*paths, PATTERN, causal=True, out=tmp_path / "attention")
        files = sorted(p for p in written.iterdir() if p.suffix == ".npy")
        joined = torch.from_numpy(np.concatenate([np.load(p) for p in files], 1))
        assert_close(joined, dense_reference(q, k, v, PATTERN, causal=True), rtol=0, atol=1e-12)
        for document in (DOCUMENT, list(DOCUMENT), tmp_path / "book.bin", tmp_path / "ids.npy"):
            assert_close(gang.score(document), scores, rtol=0, atol=1e-12)
        unsigned = [ids.astype(dtype) for dtype in (np.uint16, np.uint32, np.uint64)]
        for document in (*unsigned, *map(torch.from_numpy, unsigned), tmp_path / "unsigned.npy"):
            assert_close(gang.score(document), scores, rtol=0, atol=1e-12)
        assert gang.score("é").shape == (1,)
        assert gang.score(b"a").shape == (0,)
        assert_close(gang.embed(DOCUMENT), features.mean(0), rtol=0, atol=1e-12)
        assert_close(gang.embed(DOCUMENT, pooling="last"), features[-1], rtol=0, atol=1e-12)
        assert_close(gang.embed(DOCUMENT, pooling=None), features, rtol=0, atol=1e-12)
        written = gang.embed(tmp_path / "book.bin", pooling=None, out=tmp_path / "features")
        files = sorted(p for p in written.iterdir() if p.suffix == ".npy")
        assert_close(torch.from_numpy(np.concatenate([np.load(p) for p in files])), features, rtol=0, atol=1e-12)
        options = {"temperature": 1.0, "seed": 4, "stop": [256]}
        prompt = torch.tensor(list(DOCUMENT[:40]))
        expected = LongNet.from_pretrained(folder).generate(prompt[None], 12, **options)[0, 40:]
        assert gang.generate(DOCUMENT[:40], 12, **options).tolist() == expected.tolist()
        assert gang.submit("generate", ray.put(DOCUMENT[:40]), 12, **options).result().tolist() == expected.tolist()
        # Calls are futures, and run in order.
        calls = [gang.submit("score", DOCUMENT[:n]) for n in (50, 301, 100)]
        assert_close(calls[2].result(), scores[:99], rtol=0, atol=1e-12)
        assert all(call.done() and call.progress() == 1 for call in calls)
        if ranks == 2:
            assert_mistakes_are_reported(gang, tmp_path)
            assert_many_calls_leak_nothing(gang)
            assert_close(gang.score(DOCUMENT), scores, rtol=0, atol=1e-12)
        assert gang.stats()["formed"] == 1
    with pytest.raises(ValueError, match="is closed"):
        gang.score(DOCUMENT)
    gc.collect()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def assert_mistakes_are_reported(gang, folder):
    q, k, v = random_qkv(20)
    mistakes = [
        (lambda: gang.dilated_attention(q, k[:, :5], v, PATTERN), "with the same N"),
        (lambda: gang.dilated_attention(q, k.float(), v, PATTERN), "dtype"),
        (
            lambda: gang.dilated_attention(q.to(torch.uint16), k, v, PATTERN),
            "q is of torch.uint16; it must be of float16",
        ),
        (lambda: gang.dilated_attention(q.numpy().astype(np.uint64), k, v, PATTERN), "q is of uint64"),
        (lambda: gang.dilated_attention(q.tolist(), k, v, PATTERN), r"q is \[.*; it must be a tensor, a NumPy array"),
        (lambda: gang.dilated_attention(q, k, v, PATTERN, dropout=0.1), r"\['dropout'\] are not known"),
        (lambda: gang.score([5, 999]), "token ids of rows .* 999"),
        (lambda: gang.score(np.array([2**63], np.uint64)), "holds 9223372036854775808"),
        (lambda: gang.score(None), "the document is None; it must be text"),
        (lambda: gang.submit("score", DOCUMENT).result("soon"), "timeout is 'soon'; it must be None, or at least 0"),
        (lambda: gang.submit(["score"], DOCUMENT), "must be one of dilated_attention, score, embed, generate"),
        (lambda: gang.score(DOCUMENT, out=folder / "book.bin"), "book.bin cannot be created"),
        (lambda: gang.score([]), "at least one token"),
        (lambda: gang.score([1.5, 2.0]), "they must be integers"),
        (lambda: gang.score(folder / "missing.bin"), "no such file"),
        (lambda: gang.embed(DOCUMENT, pooling="max"), "pooling is 'max'"),
        (lambda: gang.generate(DOCUMENT, 3, top_p=2.0), "top_p is 2.0; it must be above 0"),
        (lambda: gang.submit("translate", DOCUMENT), "must be one of dilated_attention, score, embed, generate"),
    ]
    for mistake, message in mistakes:
        with pytest.raises(ValueError, match=message):
            mistake()


def assert_many_calls_leak_nothing(gang):
    for number in range(200):
        assert len(gang.score(DOCUMENT[: 100 + number])) == 99 + number
        if number == 50:
            before = [rank["memory_bytes"] for rank in gang.stats()["ranks"]]
    after = [rank["memory_bytes"] for rank in gang.stats()["ranks"]]
    assert all(b - a < 20 * 2**20 for a, b in zip(before, after, strict=True)), (before, after)


RANK_LOSSES = {
    "between calls": "",
    "during a call": "died during attention",
    "during a collective": "died during attention",
    "stopped": "did not answer",
    "retried": "",
}
"""How rank 1 is lost, and what the error of the call in flight says about it; empty for no error."""


@pytest.mark.slow
def test_the_loss_of_a_rank_is_reported_and_the_gang_re_forms(ray_nodes, tmp_path):
    """A rank is killed between calls, during a call and during a collective; one is stopped; a call is retried.

    A lost call leaves its folder to the next call.
    """
    from longnet_dist.integrations.ray import GangError

    q, k, v = random_qkv(100)
    long, dense = random_qkv(3000), Pattern((3000,), (1,))
    expected = dense_reference(q, k, v, PATTERN, causal=True)
    with make_gang(ray_nodes, 2, timeout=10) as gang:
        with pytest.raises(ValueError, match="has no model"):
            gang.score(DOCUMENT)
        for formed, (loss, message) in enumerate(RANK_LOSSES.items(), start=1):
            assert_close(gang.dilated_attention(q, k, v, PATTERN, causal=True), expected, rtol=0, atol=1e-12)
            assert gang.stats()["formed"] == formed, loss
            pid = gang.stats()["ranks"][1]["pid"]
            if loss == "between calls":
                os.kill(pid, signal.SIGKILL)
                continue
            gang.retries = int(loss == "retried")
            call = gang.submit("dilated_attention", *long, dense, kernel="eager", out=tmp_path / "out")
            time.sleep(0.3)
            if loss in ("during a collective", "stopped"):  # So that the other rank waits for it.
                os.kill(pid, signal.SIGSTOP)
                time.sleep(1.5)
            if loss != "stopped":
                os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            if message:
                with pytest.raises(
                    GangError, match=rf"rank 1 of 2 \(process {pid} on node 127.0.0.2\) {message}"
                ) as caught:
                    call.result()
                assert (caught.value.rank, caught.value.node) == (1, "127.0.0.2")
                assert time.monotonic() - start < 15 + 10 * (loss == "stopped")
            else:
                files = json.loads((call.result() / "index.json").read_text())["files"]
                assert np.concatenate([np.load(tmp_path / "out" / name) for name in files], 1).shape == (2, 3000, 4, 8)
                with pytest.raises(ValueError, match="holds results already"):
                    gang.dilated_attention(q, k, v, PATTERN, out=tmp_path / "out")
        assert_close(gang.dilated_attention(q, k, v, PATTERN, causal=True), expected, rtol=0, atol=1e-12)
        assert gang.stats()["formed"] == 6


@pytest.mark.slow
def test_a_gang_over_nodes_survives_the_loss_of_one(ray_nodes):
    """Two labelled nodes hold a rank each; one node is lost, and another one joins."""
    from longnet_dist.integrations.ray import GangError

    q, k, v = random_qkv(100)
    expected = dense_reference(q, k, v, PATTERN, causal=True)
    first, second = ray_nodes.add("gang"), ray_nodes.add("gang")
    options = {"labels": {"pool": "gang"}, "placement": "STRICT_SPREAD", "form_timeout": 20}
    with make_gang(ray_nodes, 2, **options) as gang:
        assert len({rank["node"] for rank in gang.stats()["ranks"]}) == 2
        assert_close(gang.dilated_attention(q, k, v, PATTERN, causal=True), expected, rtol=0, atol=1e-12)
        ray_nodes.remove(second)
        third = ray_nodes.add("gang")
        assert_close(gang.dilated_attention(q, k, v, PATTERN, causal=True), expected, rtol=0, atol=1e-12)
    with pytest.raises(GangError, match=r"no room for 3 x .*pool.* in 1 s: the cluster has"):
        make_gang(ray_nodes, 3, **(options | {"form_timeout": 1}))
    ray_nodes.remove(first)
    ray_nodes.remove(third)


def test_the_guides_first_block_runs(ray_nodes, capsys):
    block = (ROOT / "docs" / "ray.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(block, "docs/ray.md", "exec"), {})
    assert "torch.Size([1, 5000, 8, 64])" in capsys.readouterr().out


def test_a_client_without_the_token_is_refused(ray_nodes):
    code = "import ray; ray.init(log_to_driver=False); print('admitted')"
    environment = os.environ | ray_nodes.environment | {"RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "admitted" not in done.stdout
    assert "token" in done.stderr.lower()


@pytest.mark.slow
def test_the_code_of_the_document_runs(ray_nodes, exported, tmp_path):
    """As it stands, but for the folder, the number of ranks, and the GPUs."""
    folder, _, _ = exported
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 60, 4, 8), np.float32))
    (tmp_path / "books").mkdir()
    for path in (tmp_path / "book.txt", tmp_path / "books" / "first.txt"):
        path.write_text("a book of some words. " * 10)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        code = block.replace('shared / "exported"', repr(str(folder))).replace("/shared", str(tmp_path))
        code = code.replace("Gang(8,", "Gang(2,").replace("gpus_per_rank=1, ", "")
        names: dict[str, object] = {}
        exec(compile(code, "docs/ray.md", "exec"), names)
    assert names["log_likelihoods"].shape == (len(names["book"].read_bytes()) - 1,)
