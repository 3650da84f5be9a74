"""A failure here means: Ray is asked for something else than the options say. tests/launch/ has real clusters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from longnet_dist import TrainConfig
from longnet_dist.cli import app
from longnet_dist.training.config import RayConfig
from longnet_dist.training.parallel import ParallelConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("axes", "batch_size", "ranks", "expected"),
    [
        ((1, 1, 0), 1, 3, (1, 1, 0)),  # Any number of ranks can hold a sequence.
        ((1, 2, 0), 4, 6, (1, 2, 0)),
        ((1, 2, 0), 4, 3, (1, 1, 3)),
        ((2, 2, 0), 4, 6, (1, 2, 3)),
        ((1, 4, 0), 4, 6, (1, 2, 3)),
        ((1, 3, 0), 3, 4, (1, 1, 4)),
        ((4, 1, 0), 4, 1, (1, 1, 1)),
    ],
)
def test_every_rank_is_in_use_when_there_are_fewer(axes, batch_size, ranks, expected):
    from longnet_dist.integrations.ray.train import arrangement

    parallel = arrangement(TrainConfig(batch_size=batch_size, parallel=ParallelConfig(*axes)), ranks)
    assert parallel == ParallelConfig(*expected)
    replicate, shard, sp = parallel.degrees(ranks)
    assert replicate * shard * sp == ranks
    assert batch_size % (replicate * shard) == 0


def test_a_fixed_degree_that_does_not_fit_raises():
    from longnet_dist.integrations.ray.train import arrangement

    with pytest.raises(ValueError, match="does not make the 3 ranks"):
        arrangement(TrainConfig(parallel=ParallelConfig(sp=2)), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ranks": -1}, "min_ranks and gpus_per_rank must be 0 or more"),
        ({"cpus_per_rank": 0}, "cpus_per_rank above 0"),
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
        assert "needs the package ray: pip install 'longnet-dist[ray]'" in capsys.readouterr().err


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
