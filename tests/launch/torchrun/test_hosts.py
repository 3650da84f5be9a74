"""A failure here means: a run on two machines is lost or hangs when the network between them fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.jobs import ENVIRONMENT, ROOT, forked, losses, train

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(300)]
OPTIONS = ("--steps", 30, "--seq-len", 250, "--checkpoint-every", 4, "--batch-size", 2, "--timeout", 8)
ATTRIBUTED = re.compile(r"step \d+: .*(Timed out|timed out|time limit 8 s|Connection)")
PORT = 29555  # No other process has it: the addresses exist only in this test's network namespaces.


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces with the addresses 10.77.0.1 and 10.77.0.2, and a link between them."""
    names = [f"longnet-{os.getpid()}-{n}" for n in (1, 2)]
    links = [f"ln{os.getpid() % 100_000}{side}" for side in "ab"]
    try:
        ip("netns", "add", names[0])
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("cannot make network namespaces here")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host: tuple[str, str], folder: Path, log: Path) -> subprocess.Popen:
    name, link = host
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=run",
        "--max-restarts=3",
    ]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{PORT}", f"--local-addr={address(name)}"]
    torchrun += [f"--rdzv-conf=is_host={int(name.endswith('1'))}"]  # Both namespaces have the same host name.
    with log.open("w") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, *map(str, train(folder, *OPTIONS))],
            cwd=ROOT, env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": link}, stdout=out, stderr=out,
        )  # fmt: skip


def address(name: str) -> str:
    return f"10.77.0.{name[-1]}"


def test_a_broken_link_is_reported_and_the_run_resumes_when_it_is_back(hosts, tmp_path):
    (tmp_path / "plain").mkdir()
    assert forked(2, *train(tmp_path / "plain" / "run", *OPTIONS)).returncode == 0
    folder = tmp_path / "run"
    logs = [tmp_path / f"host-{n}.log" for n in (1, 2)]
    jobs = [start(host, folder, log) for host, log in zip(hosts, logs, strict=True)]
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        assert all(job.poll() is None for job in jobs), [log.read_text() for log in logs]
        assert time.monotonic() < deadline, [log.read_text() for log in logs]
        time.sleep(0.02)  # Only the job's files show its progress.
    ip("-n", hosts[0][0], "link", "set", hosts[0][1], "down")
    cut = time.monotonic()
    while not all(ATTRIBUTED.search(log.read_text()) for log in logs):
        assert time.monotonic() - cut < 30, [log.read_text() for log in logs]
        time.sleep(0.1)
    ip("-n", hosts[0][0], "link", "set", hosts[0][1], "up")
    try:
        for job, log in zip(jobs, logs, strict=True):
            assert job.wait(120) == 0, log.read_text()
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert "resuming from" in logs[0].read_text() + logs[1].read_text()
    assert losses(folder) == losses(tmp_path / "plain" / "run")
