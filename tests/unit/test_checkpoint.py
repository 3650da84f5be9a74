"""A failure here means: a checkpoint is lost, or a damaged or hostile one is believed."""

from __future__ import annotations

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

from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.training.state import load_model, make_moments, names_without, training_state


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((100, 7), value), "optimizer.step.a": torch.tensor(value), "random.0": torch.zeros(9)}


@pytest.fixture
def folder(tmp_path):
    """Three saves, of steps 1, 2 and 3; the last two are kept."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(float(step)), {"step": step})
    return tmp_path


def newest(folder: Path, said: list[str] | None = None) -> int:
    """The step of the newest whole checkpoint, loaded and compared."""
    checkpoints = Checkpoints(folder)
    path, facts = checkpoints.newest((said if said is not None else []).append)
    loaded = state(0.0)
    checkpoints.load(path, loaded)
    for name, expected in state(float(facts["step"])).items():
        assert_close(loaded[name], expected)
    return facts["step"]


def test_the_newest_is_loaded_and_the_last_two_are_kept(folder):
    assert newest(folder) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_every_mth_is_kept_for_good(tmp_path):
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, damage):
    do, said_of_it = DAMAGES[damage]
    do(folder / "step-00000003")
    said: list[str] = []
    assert newest(folder, said) == 2
    assert len(said) == 1
    assert "step-00000003 is damaged" in said[0]
    assert said_of_it in said[0]


def test_none_whole_is_an_error(folder):
    for path in folder.iterdir():
        _flip(path / "__0_0.distcp")
    with pytest.raises(RuntimeError, match=r"no checkpoint is whole.*step-00000003.*step-00000002"):
        Checkpoints(folder).newest(lambda said: None)


def test_a_half_written_folder_is_not_a_checkpoint(folder):
    shutil.copytree(folder / "step-00000003", folder / "step-00000004.tmp-0123abcd")
    assert newest(folder) == 3
    assert Checkpoints(folder / "nothing").newest() is None
    Checkpoints(folder).save(5, state(5.0), {"step": 5})
    assert not list(folder.glob("*.tmp-*"))


def test_a_damaged_one_of_the_same_step_is_replaced_whole(folder):
    _flip(folder / "step-00000003" / "__0_0.distcp")
    Checkpoints(folder).save(3, state(3.0), {"step": 3})
    assert newest(folder) == 3


def test_a_disk_that_fails_is_a_warning_and_the_last_checkpoint_stays(folder, monkeypatch):
    """A real full disk is in tests/launch/test_reliability.py."""
    import longnet_dist.checkpoints.checkpoints

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(longnet_dist.checkpoints.checkpoints, "save", full)
    with pytest.warns(UserWarning, match=r"no checkpoint of step 5.*No space"):
        Checkpoints(folder).save(5, state(5.0), {"step": 5})
    assert newest(folder) == 3
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_in_the_background_what_was_passed_is_what_is_written(tmp_path, monkeypatch):
    """Training writes to its tensors at once: the checkpoint must have been staged."""
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
def test_another_models_checkpoint_is_refused(folder, change):
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .* in this run"):
        checkpoints.load(checkpoints.newest()[0], change)


def test_damaged_ones_do_not_count_as_the_newest(tmp_path):
    """A run that passed over two damaged checkpoints keeps the one it went on from, and the one it writes."""
    for step in (4, 8, 10):
        Checkpoints(tmp_path, keep_last=3).save(step, state(float(step)), {"step": step})
    for step in (8, 10):
        _flip(tmp_path / f"step-{step:08d}" / "__0_0.distcp")
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.newest(lambda said: None)[1] == {"step": 4}
    checkpoints.save(6, state(6.0), {"step": 6})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert newest(tmp_path) == 6


def test_what_could_not_be_read_once_is_kept(folder):
    """An input/output error proves no damage: neither a later nor an earlier save may remove the checkpoint."""
    Checkpoints(folder).save(8, state(8.0), {"step": 8})
    file = folder / "step-00000008" / "__0_0.distcp"
    whole = file.read_bytes()
    file.unlink()
    file.symlink_to("/proc/self/mem")  # Of which a read at 0 is an input/output error.
    checkpoints, said = Checkpoints(folder), []
    assert checkpoints.newest(said.append)[1] == {"step": 3}
    assert re.search(r"step-00000008 cannot be read, and is passed over and kept: .*Input/output error", said[0])
    checkpoints.save(4, state(4.0), {"step": 4})
    with pytest.warns(
        UserWarning, match=r"no checkpoint of step 8: .*step-00000008 could not be read and may be whole"
    ):
        checkpoints.save(8, state(0.0), {"step": 8})
    for step in (9, 10):
        checkpoints.save(step, state(float(step)), {"step": step})
    assert sorted(int(p.name[-2:]) for p in folder.iterdir()) == [8, 9, 10]
    file.unlink()
    file.write_bytes(whole)
    for step in (9, 10):
        shutil.rmtree(folder / f"step-{step:08d}")
    assert newest(folder) == 8


def test_none_can_be_read_is_an_error(tmp_path):
    Checkpoints(tmp_path).save(1, state(1.0), {"step": 1})
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*step-00000001: .*symbolic links"):
        Checkpoints(tmp_path).newest(lambda said: None)


@contextmanager
def _forbidden(path: Path) -> Iterator[None]:
    """Root may list every folder, so that another user must try."""
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
def _made(path: Path, how: str) -> Iterator[None]:
    if how == "a file":
        path.write_text("")
    else:
        path.symlink_to(path if how == "a loop" else path / "nothing")
    yield


@pytest.mark.parametrize("how", ["forbidden", "a file", "a loop", "a link to nothing"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, how):
    path = tmp_path / "checkpoints"
    with _forbidden(path) if how == "forbidden" else _made(path, how):
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


def test_moments_are_never_made_up():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="the optimizer has no step, exp_avg, exp_avg_sq of weight"):
        training_state(model, optimizer, 0)
    assert not optimizer.state
    make_moments(optimizer)
    assert_close(training_state(model, optimizer, 0)["optimizer.exp_avg.bias"], torch.zeros(2))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert training_state(model, optimizer, 0)["optimizer.step.bias"] == 1
    optimizer.state[torch.nn.Parameter(torch.zeros(1))] = {}
    with pytest.raises(RuntimeError, match="moments of 3 parameters, and the model 2: those of others are stale"):
        training_state(model, optimizer, 0)


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-never-run",)


def test_a_hostile_pickle_is_refused(folder):
    (folder / "step-00000003" / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system, which no checkpoint needs"):
        TensorsOnlyReader(folder / "step-00000003").read_metadata()
    assert not Path("/tmp/this-must-never-run").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pickled_objects_among_the_tensors_are_refused(tmp_path):
    torch.distributed.checkpoint.save({"model.a": _Hostile.__name__}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(pickle.UnpicklingError, match="holds pickled objects"):
        TensorsOnlyReader(tmp_path).read_metadata()


def test_names_without():
    assert list(names_without(state(1), ["random."])) == ["model.a", "optimizer.step.a"]
