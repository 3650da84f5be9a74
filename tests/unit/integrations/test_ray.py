"""A failure here means: Ray is asked for something else than the options say. tests/launch/ has real clusters."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from longnet_dist.cli import app
from longnet_dist.training.config import RayConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ranks": -1}, "min_ranks and gpus_per_rank must be 0 or more"),
        ({"cpus_per_rank": 0}, "cpus_per_rank above 0"),
        ({"cpus_per_rank": float("nan")}, "cpus_per_rank above 0"),
        ({"cpus_per_rank": float("inf")}, "cpus_per_rank is inf; it must be a number between 0 and 1,000,000,000"),
        ({"gpus_per_rank": float("nan")}, "gpus_per_rank is nan; it must be a number between 0"),
        ({"gpus_per_rank": float("inf")}, "gpus_per_rank is inf"),
        ({"gpus_per_rank": -1}, "min_ranks and gpus_per_rank must be 0 or more"),
        ({"gpus_per_rank": 1.5}, "gpus_per_rank is 1.5; above 1 it must be a whole number"),
        ({"resources": {"tpu": float("nan")}}, "tpu is nan; it must be a number between 0"),
        ({"resources": {"tpu": -1}}, "tpu is -1"),
        ({"resize_seconds": float("nan")}, "resize_seconds is nan; it must be above 0 and finite"),
        ({"resize_seconds": float("inf")}, "resize_seconds is inf"),
        ({"resize_seconds": 0}, "resize_seconds is 0"),
        ({"placement": "NEAR"}, "placement is 'NEAR'; it must be one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD"),
        ({"labels": {"a": "b"}, "min_ranks": 1}, "labels and min_ranks do not go together"),
    ],
)
def test_options_that_cannot_work_raise(options, message):
    with pytest.raises(ValueError, match=message):
        RayConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launcher", "ray"], "give --run-folder, a path that every node sees"),
        (["--launcher", "ray", "--run-folder", "x", "--ranks", "0"], "ranks is 0; it must be at least 1"),
        (["--launcher", "ray", "--run-folder", "x", "--ranks", "3", "--ray.min-ranks", "4"], "at least min_ranks, 4"),
        (["--launcher", "ray", "--run-folder", "x", "--ranks", "3", "--parallel.sp", "2"], "does not make the 3 ranks"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(arguments, message, capsys):
    assert app.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_ray_package_is_reported_with_its_extra(monkeypatch, capsys):
    for name in list(sys.modules):
        if name == "ray" or name.startswith(("ray.", "longnet_dist.integrations")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["train", "--launcher", "ray"], ["doctor", "--cluster"]):
        assert app.main(command) == 2
        assert "needs the package ray: pip install -e '.[ray]' in a checkout" in capsys.readouterr().err


def test_a_rank_reads_only_its_rows(tmp_path):
    from longnet_dist.integrations.ray.rank import Rows

    whole = torch.arange(2 * 10 * 3).view(2, 10, 3)
    np.save(tmp_path / "x.npy", whole.numpy())
    assert Rows(tmp_path / "x.npy", dim=1).read(4, 7).tolist() == whole[:, 4:7].tolist()
    (tmp_path / "x.txt").write_bytes(b"abcdef")
    assert Rows(tmp_path / "x.txt").read(4, 9).tolist() == list(b"ef")
    np.save(tmp_path / "hostile.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        Rows(tmp_path / "hostile.npy").read(0, 1)


def test_a_gang_starts_without_slow_imports():
    """The store's actor starts without torch, and ranks start without Ray Train; each import takes seconds."""
    from ray import cloudpickle

    from longnet_dist.integrations.ray.store import StoreActor

    code = "import pickle, sys; pickle.load(sys.stdin.buffer); assert 'torch' not in sys.modules\n"
    code += "import longnet_dist.integrations.ray; assert 'ray.train' not in sys.modules"
    pickled = cloudpickle.dumps(StoreActor)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=pickled, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def silent_port():
    """A port of this machine that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.2", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port():
    """A port of this machine that refuses connections: it is bound, and nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("command", ["doctor", "train"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{closed}", "refused"),
        ("ray://127.0.0.1:{closed}", "refused"),
        ("127.0.0.2:{silent}", "no Ray answers at 127.0.0.2:{silent} within 5 s"),
        ("ray://127.0.0.2:{silent}", "no Ray answers at 127.0.0.2:{silent} within 5 s"),
        ("nowhere.invalid:6379", "nowhere.invalid"),
        ("127.0.0.1:70000", "the port is '70000'; it must be between 1 and 65535"),
        ("127.0.0.1:http", "the port is 'http'"),
        ("127.0.0.1", "it must be HOST:PORT"),
        ("http://127.0.0.1:8265", "it must be HOST:PORT"),
    ],
)
def test_a_dead_address_is_reported_within_seconds(
    command, address, message, silent_port, closed_port, tmp_path, monkeypatch, capsys
):
    address, message = (text.format(closed=closed_port, silent=silent_port) for text in (address, message))
    monkeypatch.setenv("RAY_ADDRESS", address)
    arguments = {"doctor": ["--cluster"], "train": ["--launcher", "ray", "--run-folder", str(tmp_path / "run")]}
    assert app.main([command, *arguments[command]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"RAY_ADDRESS is '{address}'" in line
    assert re.search(message, line), line


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_limit_of_the_doctor_that_cannot_work_is_reported(seconds, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    assert app.main(["doctor", "--cluster", "--timeout", seconds]) == 2
    assert f"timeout is {float(seconds)} and" in capsys.readouterr().err


def test_the_token_that_protects_a_local_cluster_is_readable_by_its_owner_alone(tmp_path, monkeypatch):
    """It is made only where Ray would make one, and a token that others can read is left as it is, with a warning."""
    from longnet_dist.integrations.ray.connection import prepare_token

    token = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("RAY_AUTH_TOKEN", "a" * 64), ("RAY_AUTH_TOKEN_PATH", "b"), ("RAY_AUTH_MODE", "disabled")):
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "")
        monkeypatch.setenv(name, value)
        prepare_token()
        monkeypatch.delenv(name)
        assert not token.exists()
    for _ in range(2):
        prepare_token()
        assert token.stat().st_mode & 0o777 == 0o600
        assert token.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
    text = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", text)
    token.chmod(0o644)
    with pytest.warns(UserWarning, match=f"chmod 600 {token}"):
        prepare_token()
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o644, text)


@pytest.mark.parametrize(("address", "expected"), [(None, True), ("", True), ("local", True), ("auto", False)])
def test_only_an_address_names_a_cluster(address, expected, monkeypatch):
    from longnet_dist.integrations.ray.connection import has_no_cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert has_no_cluster() == expected
