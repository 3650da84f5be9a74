"""A failure here means: a run under torchrun ends when one of its machines is lost, although it may have fewer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.jobs import ENVIRONMENT, ROOT, forked, losses, train

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(300)]
OPTIONS = ("--steps", 40, "--seq-len", 250, "--checkpoint-every", 3, "--batch-size", 2)


def start_agent(number: int, port: int, log: Path, arguments: list[object]) -> subprocess.Popen:
    """Start one of two agents, each with one rank, of a job that needs one; number 0 holds the rendezvous."""
    rendezvous = f"is_host={1 - number},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2"
    torchrun = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-id=run", "--max-restarts=3", "--local-addr=127.0.0.1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={rendezvous}"]
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *torchrun, *map(str, arguments)],
            cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=out, stderr=out,
        )  # fmt: skip


@pytest.mark.parametrize("axes", [(), ("--parallel.dp-shard", 2)])
def test_the_rest_goes_on_when_one_of_two_agents_is_killed(tmp_path, axes):
    """With axes that do not fit the ranks that are left, they are arranged as under Ray."""
    (tmp_path / "plain").mkdir()
    assert forked(2, *train(tmp_path / "plain" / "run", *OPTIONS, *axes)).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, logs = tmp_path / "run", [tmp_path / f"agent-{n}.log" for n in (0, 1)]
    agents = [start_agent(n, port, log, train(folder, *OPTIONS, *axes)) for n, log in enumerate(logs)]
    try:
        metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 90
        while not (metrics.exists() and '"step": 5,' in metrics.read_text()):
            assert time.monotonic() < deadline, logs[0].read_text()
            assert agents[0].poll() is None, logs[0].read_text()
        agents[1].kill()
        assert agents[0].wait(120) == 0, logs[0].read_text()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    output = logs[0].read_text()
    assert "on 2 ranks" in output
    assert "on 1 rank\n" in output
    assert ("had 2 ranks, and has 1 now: dp_replicate 1, dp_shard 1, sp 1" in output) == bool(axes)
    assert losses(folder) == pytest.approx(losses(tmp_path / "plain" / "run"), rel=1e-10)
