"""A failure here means: a checkpoint is lost, or a damaged or hostile one is trusted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from longnet_dist.checkpoints import verification
from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.training.state import MasterWeights, load_model, make_moments, training_state, without_prefixes


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((100, 7), value), "optimizer.step.a": torch.tensor(value), "random.0": torch.zeros(9)}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints after saves of steps 1, 2 and 3; those of 2 and 3 are left."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(float(step)), {"step": step})
    return tmp_path


def newest(folder: Path, messages: list[str] | None = None) -> int:
    """Load the newest complete checkpoint, compare its tensors, and return its step."""
    checkpoints = Checkpoints(folder)
    path, facts = checkpoints.newest((messages if messages is not None else []).append)
    loaded = state(0.0)
    checkpoints.load(path, loaded)
    for name, expected in state(float(facts["step"])).items():
        assert_close(loaded[name], expected)
    return facts["step"]


def test_loads_the_newest_and_keeps_the_last_two(folder):
    assert newest(folder) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_keeps_multiples_of_keep_every_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, state(step), {"step": step})
    assert sorted(int(p.name[-2:]) for p in tmp_path.iterdir()) == [4, 8, 9, 10]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def _alter(path: Path, name: str, value: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {name: value}))


DAMAGES = {
    "a byte flipped": (lambda p: _flip(p / "__0_0.distcp"), "not as it was written"),
    "truncated": (lambda p: _cut(p / "__0_0.distcp", 100), "100 bytes now"),
    "a file gone": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "metadata flipped": (lambda p: _flip(p / ".metadata"), "not as it was written"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda p: _cut(p / "manifest.json", 40), "manifest.json cannot be read"),
    "altered facts": (lambda p: _alter(p, "facts", {"step": 9}), "manifest.json is not as it was written"),
    "no files listed": (lambda p: _alter(p, "files", {}), "manifest.json is not as it was written"),
    "another manifest": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "another step's file": (
        lambda p: (p / "__0_0.distcp").write_bytes((p.parent / "step-00000002" / "__0_0.distcp").read_bytes()),
        "not as it was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_names_a_damaged_checkpoint_and_uses_the_one_before(folder, damage):
    do_damage, problem = DAMAGES[damage]
    do_damage(folder / "step-00000003")
    messages: list[str] = []
    assert newest(folder, messages) == 2
    assert len(messages) == 1
    assert "step-00000003 is damaged" in messages[0]
    assert problem in messages[0]


def test_only_damaged_checkpoints_are_an_error(folder):
    for path in folder.iterdir():
        _flip(path / "__0_0.distcp")
    with pytest.raises(RuntimeError, match=r"no checkpoint is whole.*step-00000003.*step-00000002"):
        Checkpoints(folder).newest(lambda message: None)


def test_a_half_written_folder_is_not_a_checkpoint(folder):
    shutil.copytree(folder / "step-00000003", folder / "step-00000004.tmp-0123abcd")
    assert newest(folder) == 3
    assert Checkpoints(folder / "nothing").newest() is None
    Checkpoints(folder).save(5, state(5.0), {"step": 5})
    assert not list(folder.glob("*.tmp-*"))


def test_a_save_replaces_a_damaged_checkpoint_of_its_step(folder):
    _flip(folder / "step-00000003" / "__0_0.distcp")
    Checkpoints(folder).save(3, state(3.0), {"step": 3})
    assert newest(folder) == 3


def test_a_failing_disk_is_a_warning_and_the_last_checkpoint_stays(folder, monkeypatch):
    """A real full disk is in tests/launch/torchrun/test_reliability.py."""
    import longnet_dist.checkpoints.checkpoints

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(longnet_dist.checkpoints.checkpoints, "save", full)
    with pytest.warns(UserWarning, match=r"no checkpoint of step 5.*No space"):
        Checkpoints(folder).save(5, state(5.0), {"step": 5})
    assert newest(folder) == 3
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_a_background_save_writes_the_values_at_the_call(tmp_path, monkeypatch):
    """Training overwrites its tensors at once, so a save must copy them first."""
    import longnet_dist.checkpoints.checkpoints

    gate, real = threading.Event(), longnet_dist.checkpoints.checkpoints.save

    def slow(*args, **kwargs):
        assert gate.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(longnet_dist.checkpoints.checkpoints, "save", slow)
    checkpoints, tensors = Checkpoints(tmp_path, asynchronous=True), state(1.0)
    checkpoints.save(1, tensors, {"step": 1})
    for x in tensors.values():
        x.fill_(9)
    gate.set()
    checkpoints.wait()
    assert newest(tmp_path) == 1


@pytest.mark.parametrize(
    "change", [{"model.a": torch.zeros(3)}, {"model.b": torch.zeros(3)}, {"model.a": torch.zeros(100, 7).half()}]
)
def test_the_checkpoint_of_another_model_raises(folder, change):
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .* in this run"):
        checkpoints.load(checkpoints.newest()[0], change)


def test_damaged_checkpoints_do_not_count_as_the_newest(tmp_path):
    """A run that passed over two damaged checkpoints keeps the one it resumed from, and the one it writes."""
    for step in (4, 8, 10):
        Checkpoints(tmp_path, keep_last=3).save(step, state(float(step)), {"step": step})
    for step in (8, 10):
        _flip(tmp_path / f"step-{step:08d}" / "__0_0.distcp")
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.newest(lambda message: None)[1] == {"step": 4}
    checkpoints.save(6, state(6.0), {"step": 6})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert newest(tmp_path) == 6


def test_an_unreadable_checkpoint_is_kept(folder, monkeypatch):
    """An input/output error proves no damage, so no save of an earlier or later step may remove the checkpoint."""
    real = verification.describe_file

    def broken(path):
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    Checkpoints(folder).save(8, state(8.0), {"step": 8})
    file = folder / "step-00000008" / "__0_0.distcp"
    monkeypatch.setattr(verification, "describe_file", broken)
    checkpoints, messages = Checkpoints(folder), []
    assert checkpoints.newest(messages.append)[1] == {"step": 3}
    assert re.search(r"step-00000008 cannot be read, and is passed over and kept: .*Input/output error", messages[0])
    checkpoints.save(4, state(4.0), {"step": 4})
    with pytest.warns(
        UserWarning, match=r"no checkpoint of step 8: .*step-00000008 could not be read and may be whole"
    ):
        checkpoints.save(8, state(0.0), {"step": 8})
    for step in (9, 10):
        checkpoints.save(step, state(float(step)), {"step": step})
    assert sorted(int(p.name[-2:]) for p in folder.iterdir()) == [8, 9, 10]
    monkeypatch.undo()
    for step in (9, 10):
        shutil.rmtree(folder / f"step-{step:08d}")
    assert newest(folder) == 8


def test_only_unreadable_checkpoints_are_an_error(tmp_path):
    Checkpoints(tmp_path).save(1, state(1.0), {"step": 1})
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*step-00000001: .*symbolic links"):
        Checkpoints(tmp_path).newest(lambda message: None)


@contextmanager
def _forbidden(path: Path) -> Iterator[None]:
    """Make a folder that cannot be listed; root can list any folder, so become another user."""
    path.mkdir()
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def _unlistable(path: Path, how: str) -> Iterator[None]:
    if how == "a file":
        path.write_text("")
    else:
        path.symlink_to(path if how == "a loop" else path / "nothing")
    yield


@pytest.mark.parametrize("how", ["forbidden", "a file", "a loop", "a link to nothing"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, how):
    path = tmp_path / "checkpoints"
    with _forbidden(path) if how == "forbidden" else _unlistable(path, how):
        with pytest.raises(CheckpointError, match=r"the checkpoints in .* cannot be read: \w+Error"):
            Checkpoints(path).newest()
        with pytest.raises(CheckpointError, match=r"the checkpoints in .* cannot be read: \w+Error"):
            load_model(tmp_path)


def save_and_wait(checkpoints: Checkpoints, step: int, tensors: dict[str, torch.Tensor]) -> None:
    checkpoints.save(step, tensors, {"step": step})
    checkpoints.wait()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_is_not_finite_displaces_nothing(folder, value, asynchronous):
    checkpoints, broken = Checkpoints(folder, asynchronous=asynchronous), state(4.0)
    broken["model.a"][50, 3] = value
    with pytest.warns(UserWarning, match="no checkpoint of step 4: model.a holds NaN or infinity"):
        save_and_wait(checkpoints, 4, broken)
    assert checkpoints.problem == "model.a holds NaN or infinity"
    assert newest(folder) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    save_and_wait(checkpoints, 5, state(5.0))
    assert checkpoints.problem is None
    assert newest(folder) == 5


def test_a_slow_save_says_how_far_it_is(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("longnet_dist.distributed.patience.MESSAGE_SECONDS", 0.002)
    Checkpoints(tmp_path).save(1, {"model.a": torch.zeros(30_000_000)}, {"step": 1})
    error = capfd.readouterr().err
    assert re.search(
        r"writing .*/step-00000001\.tmp-\w+: [\d.]+ \w+ of the 114\.4 MiB that rank 0 writes \(0 s\)", error
    )


def test_missing_or_stale_moments_raise():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="the optimizer has no step, exp_avg, exp_avg_sq of weight"):
        training_state(MasterWeights(model), optimizer, 0)
    assert not optimizer.state
    make_moments(optimizer)
    assert_close(training_state(MasterWeights(model), optimizer, 0)["optimizer.exp_avg.bias"], torch.zeros(2))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert training_state(MasterWeights(model), optimizer, 0)["optimizer.step.bias"] == 1
    optimizer.state[torch.nn.Parameter(torch.zeros(1))] = {}
    with pytest.raises(RuntimeError, match="moments of 3 parameters, and the model 2: those of others are stale"):
        training_state(MasterWeights(model), optimizer, 0)


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-never-run",)


def test_a_hostile_pickle_raises(folder):
    (folder / "step-00000003" / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system, which no checkpoint needs"):
        TensorsOnlyReader(folder / "step-00000003").read_metadata()
    assert not Path("/tmp/this-must-never-run").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pickled_objects_among_the_tensors_raise(tmp_path):
    torch.distributed.checkpoint.save({"model.a": _Hostile.__name__}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(pickle.UnpicklingError, match="holds pickled objects"):
        TensorsOnlyReader(tmp_path).read_metadata()


def test_without_prefixes():
    assert list(without_prefixes(state(1), ["random."])) == ["model.a", "optimizer.step.a"]
