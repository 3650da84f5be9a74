"""Real jobs for tests, started by torchrun or by python alone, that train a tiny float64 model.

`forked` starts ranks faster, because they need not import torch. It is for tests of what ranks compute, not of how
they are started.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from tests.pool import forkserver

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TINY = (
    "--dtype", "float64", "--warmup-steps", 2, "--validation-sequences", 2, "--validate-every", 2,
    "--model.d-model", 16, "--model.num-layers", 2, "--model.num-heads", 2,
    "--model.segment-lengths", 64, 256, "--model.dilation-rates", 1, 4,
)  # fmt: skip
SHORT = ("--seq-len", 250, "--checkpoint-every", 2, "--batch-size", 2)
TWELVE_STEPS = ("--steps", 12, *SHORT)


def command(ranks: int, *arguments: object, launcher: tuple[object, ...] = ()) -> list[str]:
    """Return the command line: python, or torchrun if there are several ranks or options for it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    return [sys.executable, *map(str, torchrun if ranks > 1 or launcher else []), *map(str, arguments)]


def by_accelerate(ranks: int, folder: Path, example: str) -> str:
    """Run an example by `accelerate launch`, and return its output."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0", "--cpu", f"--num_processes={ranks}"]
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(folder)}
    done = subprocess.run([*launch, example], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(ranks: int, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a job in a session of its own."""
    return subprocess.Popen(
        command(ranks, *arguments, **options),  # type: ignore[arg-type]
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(ranks: int, *arguments: object, limit: float = 150, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    job = start(ranks, *arguments, **options)
    try:
        out, error = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, 9)
        raise AssertionError(f"still running after {limit} s: {job.communicate()}") from None
    return subprocess.CompletedProcess(job.args, job.returncode, out, error)


def forked(ranks: int, *arguments: object, limit: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a job whose ranks are forked from the pool's server, which has imported torch. If a rank fails, all end."""
    context = forkserver()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
    job |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as outputs:
        processes = []
        for rank in range(ranks):
            rank_variables = {} if ranks == 1 else job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = dict(os.environ) | ENVIRONMENT | rank_variables
            processes.append(context.Process(target=_rank, args=(environment, words, f"{outputs}/{rank}")))
            processes[-1].start()
        deadline = time.monotonic() + limit
        while running := [p.sentinel for p in processes if p.exitcode is None]:
            ended = wait(running, timeout=max(0, deadline - time.monotonic()))
            if not ended or any(p.exitcode for p in processes):
                break
        late = time.monotonic() >= deadline
        for process in processes:
            process.join(0 if late else 10)  # Ranks that fail together all print why.
            process.kill()
            process.join()
        out, error = (_concatenate(Path(outputs).glob(f"*.{stream}")) for stream in "oe")
    assert not late, f"still running after {limit} s: {out}{error}"
    code = next((p.exitcode for p in processes if p.exitcode), 0)
    return subprocess.CompletedProcess(words, code, out, error)


def _concatenate(paths: Iterable[Path]) -> str:
    return "".join(path.read_text() for path in sorted(paths))


def _rank(environment: dict[str, str], words: list[str], output: str) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(ROOT)
    for descriptor, stream in ((1, "o"), (2, "e")):
        os.dup2(os.open(f"{output}.{stream}", os.O_CREAT | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def train(folder: Path, *options: object) -> list[object]:
    """Return the arguments of a tiny training run in `folder`, on a text next to it."""
    text, cache = folder.parent / "text.txt", folder.parent / "cache"
    if not text.exists():
        text.write_text("".join(f"line {n} of a text that repeats itself, and counts\n" for n in range(1000)))
    return ["-m", "longnet_dist", "train", "--data", text, "--cache", cache, "--run-folder", folder, *TINY, *options]


def losses(folder: Path) -> list[float]:
    """Return the loss of every step in a run's metrics, which must hold each step once, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def until(folder: Path, step: int, job: subprocess.Popen[str], limit: float = 90) -> None:
    """Wait until the metrics of a run include this step."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)  # Only the job's files show its progress.
    raise AssertionError(f"step {step} was not reached in {limit} s")
