"""A failure here means: a run under Ray Train differs from one under torchrun, or does not survive a loss."""

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
from longnet_dist.checkpoints.storage import storage_path
from longnet_dist.training.job import local_run_files
from tests.launch.jobs import ENVIRONMENT, ROOT, SHORT, command, losses, start, train, until

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


class Job:
    """A process that runs `longnet-dist train --launcher ray`."""

    def __init__(self, nodes, folder: Path, *options: object) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        arguments = train(folder, *SHORT, "--launcher", "ray", *options)
        environment = ENVIRONMENT | nodes.environment
        # Short limits: Ray waits for a lost node until the cluster notices the loss, and polls for changes.
        environment |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        environment |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(1, *arguments), cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
            )

    def wait_for(self, condition, name: str, limit: float = 120) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {name} in {limit} s: {self.log.read_text()}"
            time.sleep(0.02)  # Only the job's files show its progress.

    def groups(self) -> list[list[int]]:
        """The process ids of each worker group that was started."""
        started = re.split("Started training worker group of size", self.log.read_text())[1:]
        groups = []
        for text in started:
            size = int(re.match(r" (\d+):", text)[1])
            groups.append([int(pid) for pid in re.findall(r"pid=(\d+)\) world_rank=\d+", text)[:size]])
        return [pids for pids in groups if pids]

    def addresses(self) -> list[str]:
        """The node of each worker in the group that was started last, by rank."""
        text = re.split("Started training worker group of size", self.log.read_text())[-1]
        return re.findall(r"ip=([\d.]+), pid=\d+\) world_rank=\d+", text)

    def registered(self, step: int) -> bool:
        path = self.folder / "checkpoint_manager_snapshot.json"
        return path.exists() and f"step-{step:08d}" in path.read_text()

    def resumed(self) -> list[str]:
        """The number of ranks that wrote each checkpoint from which the run resumed."""
        return re.findall(r"resuming from .* on (\d) ranks", self.log.read_text())

    def steps(self) -> int:
        """The number of steps that were run, including those that a restart repeats."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def trained(self, step: int) -> bool:
        path = self.folder / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()

    def kill(self, limit: float = 30) -> None:
        """Kill the driver, and wait until Ray has ended the workers, which write the metrics."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + limit
        while any(Path(f"/proc/{pid}").exists() for pid in self.groups()[-1]):
            assert time.monotonic() < deadline, f"the workers still run {limit} s after the driver was killed"
            time.sleep(0.02)

    def end(self, limit: float = 120) -> str:
        try:
            self.process.wait(limit)
        finally:
            self.process.kill()
        output = self.log.read_text()
        assert self.process.returncode == 0, output
        return output


def plain_losses(folder: Path, ranks: int, steps: int, *options: object) -> list[float]:
    """The losses of the first steps of a run of 3000 steps that nothing disturbs and that writes no checkpoint."""
    folder.mkdir()
    job = start(ranks, *train(folder / "run", *SHORT, "--steps", 3000, *options, "--checkpoint-every", 0))
    until(folder / "run", steps + 1, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return losses(folder / "run")[:steps]


@pytest.fixture
def start_job(ray_nodes):
    """A function that starts jobs, which are killed at the end of the test."""
    jobs = []

    def start(*arguments):
        jobs.append(Job(ray_nodes, *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.wait()


def test_a_run_whose_workers_are_killed_twice_equals_the_run_under_torchrun(
    ray_nodes, start_job, undisturbed, tmp_path
):
    """SIGKILL right after a checkpoint was registered, and again soon after the restart: the losses are identical."""
    node = ray_nodes.add("train", cpus=2)
    job = start_job(tmp_path / "run", "--steps", 12, "--ranks", 2, "--ray.labels", "pool", "train")
    job.wait_for(lambda: job.registered(4), "checkpoint")
    os.kill(job.groups()[-1][1], signal.SIGKILL)
    job.wait_for(lambda: len(job.groups()) == 2 and job.trained(7), "restart")
    os.kill(job.groups()[-1][0], signal.SIGKILL)
    output = job.end()
    assert len(job.groups()) == 3
    assert "resuming from" in output
    assert losses(tmp_path / "run") == undisturbed
    ray_nodes.remove(node)


@pytest.mark.slow
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_joins(ray_nodes, start_job, tmp_path):
    """Two ranks, one, two: the data keeps its order, so the losses are the same to rounding."""
    first, second = ray_nodes.add("elastic"), ray_nodes.add("elastic")
    options = ("--ranks", 2, "--ray.min-ranks", 1, "--ray.resize-seconds", 3, "--ray.resources", "elastic", 1)
    job = start_job(tmp_path / "run", "--steps", 3000, *options)

    def wait_for_group(size: int) -> None:
        """Wait until a group of this size has started and run some steps."""
        job.wait_for(lambda: job.groups() and len(job.groups()[-1]) == size, f"group of {size}")
        steps_before = job.steps()
        job.wait_for(lambda: job.steps() > steps_before + 4, f"step of a group of {size}")

    wait_for_group(2)
    ray_nodes.remove(second)
    wait_for_group(1)
    third = ray_nodes.add("elastic")
    wait_for_group(2)
    # One rank resumed from a checkpoint of two, and two from a checkpoint of one.
    job.wait_for(lambda: job.resumed()[-2:] == ["2", "1"], "report of the checkpoint that it resumed from")
    last = job.steps()
    job.kill()
    ray_nodes.remove(first)
    ray_nodes.remove(third)
    assert losses(tmp_path / "run")[:last] == pytest.approx(plain_losses(tmp_path / "plain", 1, last), rel=1e-9)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_that_moves_to_a_spare_node_has_the_losses_of_an_undisturbed_one(ray_nodes, start_job, tmp_path):
    """A node of two is lost, and there is a third: the run has two ranks again, so the losses are identical."""
    nodes = {node.node_ip_address: node for node in (ray_nodes.add("moved") for _ in range(3))}
    job = start_job(tmp_path / "run", "--steps", 3000, "--ranks", 2, "--ray.labels", "pool", "moved")
    job.wait_for(lambda: job.registered(6), "checkpoint")
    before = job.addresses()
    assert len(set(before)) == 2
    ray_nodes.remove(nodes.pop(before[1]))
    job.wait_for(lambda: len(job.groups()) == 2, "second group")
    steps_before = job.steps()
    job.wait_for(lambda: job.steps() > steps_before + 6, "step of the second group")
    assert set(job.addresses()) == set(nodes)
    job.kill()
    for node in nodes.values():
        ray_nodes.remove(node)
    moved = losses(tmp_path / "run")
    assert moved == plain_losses(tmp_path / "plain", 2, len(moved))
    assert job.resumed() == ["2"]


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_by_the_same_command(ray_nodes, start_job, undisturbed, tmp_path):
    """SIGKILL to the driver in mid-run: its workers end, and the second start has the losses of an undisturbed run."""
    node = ray_nodes.add("driver", cpus=2)
    arguments = (tmp_path / "run", "--steps", 12, "--ranks", 2, "--ray.labels", "pool", "driver")
    first = start_job(*arguments)
    first.wait_for(lambda: first.registered(4), "checkpoint")
    workers = first.groups()[-1]
    first.process.kill()
    first.process.wait()
    assert not first.trained(12)
    assert len(workers) == 2
    second = start_job(*arguments)
    assert "resuming from" in second.end()
    assert losses(tmp_path / "run") == undisturbed
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    ray_nodes.remove(node)


@pytest.mark.slow
def test_a_preemption_notice_leads_to_a_checkpoint(ray_nodes, start_job, tmp_path, bucket):
    """Ray's own command gives notice: the run writes a checkpoint to its store at once, and resumes on another node.

    The losses are those of a run that nothing disturbs.
    """
    store = f"{bucket}/runs/first"
    first = ray_nodes.add("spot")
    options = ("--ranks", 1, "--ray.labels", "pool", "spot", "--ray.max-failures", 0, "--checkpoint-every", 0)
    job = start_job(tmp_path / "run", "--steps", 3000, *options, "--run-folder", store)
    job.folder = local_run_files(storage_path(store), TrainConfig(cache=tmp_path / "cache"), upload=False).folder
    job.wait_for(lambda: job.trained(5), "step")
    checkpoints = storage_path(store) / "checkpoints"
    assert not checkpoints.exists()
    second = ray_nodes.add("spot")
    drain = ["drain-node", "--node-id", first.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "a test", "--deadline-remaining-seconds", "10"]
    environment = os.environ | ray_nodes.environment
    program = Path(sys.executable).with_name("ray")
    subprocess.run([program, *drain], env=environment, check=True, capture_output=True, timeout=60)
    job.wait_for(lambda: list(checkpoints.glob("step-*/manifest.json")), "checkpoint", limit=20)
    job.wait_for(lambda: "resuming from s3://" in job.log.read_text(), "second start")
    step = int(re.findall(r"resuming from s3://.*, of step (\d+)", job.log.read_text())[-1])
    job.wait_for(lambda: job.trained(step + 6), "step after the second start")
    assert job.process.poll() is None
    assert (storage_path(store) / "checkpoint_manager_snapshot.json").exists()
    job.kill()
    preempted = losses(job.folder)
    assert preempted == plain_losses(tmp_path / "plain", 1, len(preempted))
    ray_nodes.remove(first)
    ray_nodes.remove(second)


@pytest.mark.slow
def test_ctrl_c_says_what_is_lost_and_how_to_resume(ray_nodes, start_job, tmp_path):
    node = ray_nodes.add("stopped")
    options = ("--ranks", 1, "--ray.labels", "pool", "stopped", "--checkpoint-every", 5)
    job = start_job(tmp_path / "run", "--steps", 3000, *options)
    job.wait_for(lambda: job.registered(5), "checkpoint")
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(60) == 1
    message = [line for line in job.log.read_text().splitlines() if line.startswith("longnet-dist: the run in")]
    assert len(message) == 1
    assert re.search(rf"later steps than those of {tmp_path}/run/checkpoints/step-\d+ are lost", message[0])
    assert f"longnet-dist train --resume {tmp_path}/run --launcher ray --ranks 1" in message[0]
    ray_nodes.remove(node)
