"""A failure here means: a launcher, which users edit and start, does not do what it says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.jobs import ENVIRONMENT, ROOT, losses, train, until

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
LAUNCHERS = ROOT / "launchers"


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "ray_job.sh"])
def test_a_shell_script_parses(name):
    subprocess.run(["bash", "-n", LAUNCHERS / name], check=True)


@pytest.mark.slow
def test_torchrun_trains(tmp_path):
    arguments = [str(a) for a in train(tmp_path / "run", "--steps", 2, "--seq-len", 128)[3:]]
    done = start("torchrun.sh", arguments, {"RANKS": "2"})
    assert len(losses(tmp_path / "run")) == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in done.stderr


@pytest.mark.slow
def test_torchrun_on_two_machines_trains(tmp_path):
    """Both are this machine; each has one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [str(a) for a in train(tmp_path / "run", "--steps", 2, "--seq-len", 250)[3:]]
    variables = {"RANKS": "1", "NODES": "2", "JOB": "two", "RENDEZVOUS": rendezvous, "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", LAUNCHERS / "torchrun.sh", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen(script, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert any("on 2 ranks" in output for output in outputs)
    assert len(losses(tmp_path / "run")) == 2
    refused = subprocess.run(script, cwd=ROOT, env=environment | {"JOB": ""}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "give the same JOB on all machines" in refused.stderr


def test_slurm_starts_torchrun_on_each_machine(tmp_path):
    """Stand-ins replace Slurm's programs: srun runs torchrun.sh with the values of Slurm's variables."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    (programs / "srun").write_text('#!/bin/sh\necho "$RANKS $NODES $JOB $RENDEZVOUS" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = start("slurm.sbatch", ["--seq-len", "1024"], slurm | path)
    expected = (
        "8 2 7 first:29400 --kill-on-bad-exit=0 bash ./launchers/torchrun.sh --run-folder /shared/runs/7 --seq-len 1024"
    )
    assert done.stdout.strip() == expected


def test_slurm_queues_a_job_again_after_the_notice_of_its_time_limit(tmp_path):
    """The notice becomes SIGTERM for srun, which forwards it. The stand-in for srun ends with 0 then."""
    programs = tmp_path / "bin"
    programs.mkdir()
    wait = f"import signal, pathlib; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); pathlib.Path({str(tmp_path)!r}"
    wait += ", 'started').touch(); signal.sigwait([15])"
    (programs / "scontrol").write_text(
        f'#!/bin/sh\necho first\n[ "$1" != requeue ] || echo "$@" > {tmp_path}/requeued\n'
    )
    (programs / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{wait}"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{programs}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", LAUNCHERS / "slurm.sbatch"], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)  # Only the file shows that srun has started.
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 0
    finally:
        job.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_torchrun_sh_ends_quietly_with_0_after_a_signal_and_its_checkpoint(tmp_path, name):
    arguments = [str(a) for a in train(tmp_path / "run", "--steps", 100_000, "--seq-len", 128)[3:]]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "RANKS": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ["bash", LAUNCHERS / "torchrun.sh", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(script, cwd=ROOT, env=environment, **pipes)
    try:
        until(tmp_path / "run", 3, job)
        job.send_signal(signal.Signals[name])
        output, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 0, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "stopped by a signal" in output


@pytest.mark.slow
def test_ray_launchers_train_and_resume(ray_nodes, tmp_path):
    """A run is submitted through the jobs API, and resumed from Python with the launcher's settings edited.

    Retention has removed the checkpoint that Ray registered by then; the one in the folder counts.
    """
    every = ("--checkpoint-every", 1, "--seq-len", 128)
    arguments = [str(a) for a in train(tmp_path / "run", "--steps", 3, *every)[3:]]
    job = {"RANKS": "1", "FOLDER": str(tmp_path / "run")} | ray_nodes.environment
    done = start("ray_job.sh", [a for a in arguments if a not in ("--run-folder", str(tmp_path / "run"))], job)
    assert "succeeded" in done.stdout
    assert len(losses(tmp_path / "run")) == 3
    refused = start("ray_job.sh", [], job | {"RAY_AUTH_TOKEN": "0" * 64}, fails=True)
    assert "401" in refused.stderr + refused.stdout or "uthenticat" in refused.stderr + refused.stdout

    text = (LAUNCHERS / "ray_train.py").read_text()
    sizes = "d_model=16, num_layers=2, num_heads=2, segment_lengths=(64, 256), dilation_rates=(1, 4)"
    data = f'data=("{tmp_path / "text.txt"}",), cache="{tmp_path / "cache"}", seq_len=128, steps=5, dtype="float64"'
    for old, new in (
        ('run_folder="/shared/runs/first"', f'run_folder="{tmp_path / "run"}", validation_sequences=2, {data}'),
        ("checkpoint_every=20)", f"warmup_steps=2, model=LongNetConfig({sizes}))"),
        ("import TrainConfig", "import LongNetConfig, TrainConfig"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "edited.py").write_text(text)
    environment = os.environ | ENVIRONMENT | ray_nodes.environment
    done = subprocess.run(
        [sys.executable, tmp_path / "edited.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "TrainResult(" in done.stdout
    assert "of step 3 on 1 ranks" in done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 5


def test_kuberay_requests_the_resources_of_its_command():
    """The fields of KubeRay's RayJob are used as its reference says, with a token and a command that parses."""
    (job,) = yaml.safe_load_all((LAUNCHERS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 59, 0)
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        assert all(isinstance(value, str) for value in pod["rayStartParams"].values())
        spec = pod["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    command = job["spec"]["entrypoint"].split()
    gpus = sum(
        group["replicas"] * int(c["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
        for c in group["template"]["spec"]["containers"]
    )
    assert command[:4] == ["python", "-m", "longnet_dist", "train"]
    assert command[command.index("--ranks") + 1] == str(gpus)
    usage = subprocess.run([sys.executable, "-m", "longnet_dist", "train", "--help"], capture_output=True, text=True)
    for option in (word for word in command if word.startswith("--")):
        assert option in usage.stdout


def start(name: str, arguments: list[str], variables: dict[str, str], fails: bool = False):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", LAUNCHERS / name, *arguments],
        cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done
