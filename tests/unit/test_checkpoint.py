"""A failure here means: a checkpoint is lost, or a damaged or hostile one is believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from longnet_dist.checkpoints.checkpoints import Checkpoints
from longnet_dist.checkpoints.reader import TensorsOnlyReader
from longnet_dist.training.state import names_without


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
    Checkpoints(tmp_path, keep_last=2).save(6, state(6.0), {"step": 6})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    assert newest(tmp_path) == 6


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
