"""A failure here means: a run under Ray Train is not the run that torchrun makes, or does not survive its cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longnet_dist import TrainConfig
from longnet_dist.checkpoints.storage import place
from longnet_dist.training.job import figures_of
from tests.launch.jobs import ENVIRONMENT, ROOT, SHORT, command, losses, start, train, until

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


class Job:
    """`longnet-dist train --launcher ray`, in a process of its own."""

    def __init__(self, nodes, folder: Path, *options: object) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        arguments = train(folder, *SHORT, "--launcher", "ray", *options)
        environment = ENVIRONMENT | nodes.environment
        # Of the search for room, which counts on a node until the cluster knows that it is lost; and between looks.
        environment |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        environment |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(1, *arguments), cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
            )

    def until(self, true, what: str, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while not true():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{what} did not come in {limit} s: {self.log.read_text()}"
            time.sleep(0.02)  # The job's progress shows in its files alone.

    def groups(self) -> list[list[int]]:
        """The workers' process ids, of each group of them that was started."""
        started = re.split("Started training worker group of size", self.log.read_text())[1:]
        groups = []
        for text in started:
            size = int(re.match(r" (\d+):", text)[1])
            groups.append([int(pid) for pid in re.findall(r"pid=(\d+)\) world_rank=\d+", text)[:size]])
        return [pids for pids in groups if pids]

    def registered(self, step: int) -> bool:
        path = self.folder / "checkpoint_manager_snapshot.json"
        return path.exists() and f"step-{step:08d}" in path.read_text()

    def resumed(self) -> list[str]:
        """On how many ranks the checkpoints were written from which it went on."""
        return re.findall(r"going on from .* on (\d) ranks", self.log.read_text())

    def steps(self) -> int:
        """How many there were, also of those that were lost."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def trained(self, step: int) -> bool:
        path = self.folder / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()

    def end(self, limit: float = 120) -> str:
        try:
            self.process.wait(limit)
        finally:
            self.process.kill()
        said = self.log.read_text()
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def begin(ray_nodes):
    """Starts jobs, none of which outlives its test."""
    jobs = []

    def start(*arguments):
        jobs.append(Job(ray_nodes, *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.wait()


def test_a_run_whose_workers_are_killed_twice_is_the_run_of_torchrun(ray_nodes, begin, undisturbed, tmp_path):
    """SIGKILL right after a checkpoint was registered, and again soon after the restart: the very same losses."""
    node = ray_nodes.add("train", cpus=2)
    job = begin(tmp_path / "run", "--steps", 12, "--ranks", 2, "--ray.labels", "pool", "train")
    job.until(lambda: job.registered(4), "a checkpoint")
    os.kill(job.groups()[-1][1], signal.SIGKILL)
    job.until(lambda: len(job.groups()) == 2 and job.trained(7), "a restart")
    os.kill(job.groups()[-1][0], signal.SIGKILL)
    said = job.end()
    assert len(job.groups()) == 3
    assert "going on from" in said
    assert losses(tmp_path / "run") == undisturbed
    ray_nodes.remove(node)


def test_it_shrinks_when_a_node_is_lost_and_grows_when_one_comes(ray_nodes, begin, tmp_path):
    """Two ranks, one, two: the same data in the same order, so the same losses to rounding."""
    first, second = ray_nodes.add("elastic"), ray_nodes.add("elastic")
    options = ("--ranks", 2, "--ray.min-ranks", 1, "--ray.resize-seconds", 3, "--ray.resources", "elastic", 1)
    job = begin(tmp_path / "run", "--steps", 3000, *options)

    def train_on(size: int) -> None:
        """Until a group of this size has started, and gone on for some steps."""
        job.until(lambda: job.groups() and len(job.groups()[-1]) == size, f"a group of {size}")
        seen = job.steps()
        job.until(lambda: job.steps() > seen + 4, f"steps of a group of {size}")

    train_on(2)
    ray_nodes.remove(second)
    train_on(1)
    third = ray_nodes.add("elastic")
    train_on(2)
    # From a checkpoint of two ranks on one, and of one on two.
    job.until(lambda: job.resumed()[-2:] == ["2", "1"], "a word of what it went on from")
    last = job.steps()
    job.process.kill()
    job.process.wait()
    ray_nodes.remove(first)
    ray_nodes.remove(third)
    (tmp_path / "plain").mkdir()
    plain = tmp_path / "plain" / "run"
    alone = start(1, *train(plain, *SHORT, "--steps", 3000, "--checkpoint-every", 0))
    until(plain, last + 1, alone)
    alone.kill()
    alone.communicate()
    assert losses(tmp_path / "run")[:last] == pytest.approx(losses(plain)[:last], rel=1e-9)


def test_a_node_that_is_announced_to_go_leaves_a_checkpoint(ray_nodes, begin, tmp_path, bucket):
    """A preemption notice, by Ray's own command: a checkpoint at once, in a store; the run goes on elsewhere."""
    store = f"{bucket}/runs/first"
    first = ray_nodes.add("spot")
    options = ("--ranks", 1, "--ray.labels", "pool", "spot", "--ray.max-failures", 0, "--checkpoint-every", 0)
    job = begin(tmp_path / "run", "--steps", 3000, *options, "--run-folder", store)
    job.folder = figures_of(place(store), TrainConfig(cache=tmp_path / "cache"), first=False).folder
    job.until(lambda: job.trained(5), "a step")
    checkpoints = place(store) / "checkpoints"
    assert not checkpoints.exists()
    second = ray_nodes.add("spot")
    drain = ["drain-node", "--node-id", first.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "a test", "--deadline-remaining-seconds", "10"]
    environment = os.environ | ray_nodes.environment
    program = Path(sys.executable).with_name("ray")
    subprocess.run([program, *drain], env=environment, check=True, capture_output=True, timeout=60)
    job.until(lambda: list(checkpoints.glob("step-*/manifest.json")), "a checkpoint", limit=20)
    job.until(lambda: "going on from s3://" in job.log.read_text(), "another start")
    assert job.process.poll() is None
    assert (place(store) / "checkpoint_manager_snapshot.json").exists()
    ray_nodes.remove(first)
    ray_nodes.remove(second)
