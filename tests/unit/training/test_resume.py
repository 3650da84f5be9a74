"""A failure here means: a run in one process loses steps, or resumes as another run."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import longnet_dist
from longnet_dist.checkpoints.checkpoints import CheckpointError
from longnet_dist.cli import app
from longnet_dist.distributed.patience import Patience
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.job import name_run_folder
from tests.unit.conftest import TINY


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore:step . is skipped")
def test_steps_that_are_not_finite_are_skipped_and_then_the_run_stops(config):
    """The last good checkpoint stays, and metrics are still JSON."""
    longnet_dist.train(dataclasses.replace(config, steps=2, checkpoint_every=2))
    broken = dataclasses.replace(config, steps=20, learning_rate=1e30, clip_norm=0.0, max_skipped_steps=3)
    with pytest.raises(RuntimeError, match=r"3 steps in a row were not finite.*at sequences \[\[\d+\]\] of 128 tokens"):
        longnet_dist.train(broken)
    assert [p.name for p in (config.run_folder / "checkpoints").iterdir()] == ["step-00000002"]
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorboard", "ignore:step .* is skipped", "ignore:no checkpoint of .*being skipped"
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_of_good_steps_stay_while_steps_are_skipped(config, asynchronous):
    """It does not matter if the run then fails, ends, or resumes with options under which steps are finite."""
    config = dataclasses.replace(config, async_checkpoints=asynchronous, steps=10, checkpoint_every=2)
    longnet_dist.train(config)
    before = {p: p.stat().st_mtime_ns for p in (config.run_folder / "checkpoints").iterdir()}
    assert sorted(p.name for p in before) == ["step-00000008", "step-00000010"]
    broken = dataclasses.replace(config, steps=40, learning_rate=1e30)
    with pytest.raises(RuntimeError, match=r"5 steps in a row were not finite.*if it is of step 11, .* remove it"):
        longnet_dist.train(broken)
    message = r"ended after step 12 without a checkpoint of it: steps are being skipped.*newest .* is .*step-00000010$"
    with pytest.raises(CheckpointError, match=message):
        longnet_dist.train(dataclasses.replace(broken, steps=12))
    assert before == {p: p.stat().st_mtime_ns for p in (config.run_folder / "checkpoints").iterdir()}
    result = longnet_dist.train(dataclasses.replace(config, steps=12))
    assert len(result.losses) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_checkpoints_that_cannot_be_listed_are_not_overwritten_by_a_new_run(config, capsys):
    """In a folder that is not mounted, for example, no step is made, and the metrics stay as they are."""
    longnet_dist.train(dataclasses.replace(config, steps=2))
    folder, metrics = config.run_folder / "checkpoints", (config.run_folder / "metrics.jsonl").read_text()
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder)
    options = ["--run-folder", config.run_folder, "--cache", config.cache, "--data", *config.data, "--seq-len", 128]
    assert app.main(["train", *map(str, options)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"longnet-dist: the checkpoints in {folder} cannot be read: ")
    assert (config.run_folder / "metrics.jsonl").read_text() == metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("options", [{}, {"async_checkpoints": True}, {"dtype": "bfloat16", "grad_accumulation": 2}])
def test_a_resumed_run_is_bit_for_bit_one_that_never_stopped(config, options):
    """This includes dropout and the order of the data."""
    model = dataclasses.replace(TINY, dropout=0.1)
    whole = dataclasses.replace(config, steps=8, checkpoint_every=3, model=model, **options)
    expected = longnet_dist.train(whole).losses
    again = dataclasses.replace(whole, run_folder=config.run_folder.with_name("again"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["longnet_dist.training.trainer"], "step_metrics", _stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            longnet_dist.train(again)
    result = longnet_dist.train(again)
    assert result.losses == expected[3:]
    lines = [json.loads(line) for line in (again.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert tuple(line["loss"] for line in lines) == expected


def _stop_at(step):
    from longnet_dist.training.measures import step_metrics

    def stop(config, now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return step_metrics(config, now, *rest)

    return stop


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_another_model_does_not_resume_and_changed_options_are_printed(config, capsys):
    longnet_dist.train(dataclasses.replace(config, steps=2))
    written = (config.run_folder / "config.json").read_text()
    other = dataclasses.replace(TINY, num_layers=2)
    with pytest.raises(ValueError, match=r"is of another model: num_layers 1 there, 2 here"):
        longnet_dist.train(dataclasses.replace(config, steps=3, model=other))
    assert (config.run_folder / "config.json").read_text() == written
    longnet_dist.train(dataclasses.replace(config, steps=3, seed=9))
    assert "seed was 0 and is 9" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_launcher_receives_checkpoints_and_can_ask_for_one(config, monkeypatch, asynchronous):
    """If a machine is about to leave, there is a checkpoint at once, in addition to every third step's."""

    class Session:
        def __init__(self):
            self.num_asked, self.reports = 0, []

        def device(self):
            return None

        def is_machine_leaving(self):
            self.num_asked += 1
            return self.num_asked == 2

        def report_checkpoint(self, path, metrics):
            assert (path / "manifest.json").exists()
            self.reports.append((path.name, metrics["step"]))

    monkeypatch.setattr(sys.modules["longnet_dist.training.trainer"], "ASK_SECONDS", 0.0)
    session, every = Session(), {"checkpoint_every": 3, "steps": 7, "keep_checkpoints": 9}
    longnet_dist.train(dataclasses.replace(config, async_checkpoints=asynchronous, **every), session)
    written = sorted(path.name for path in (config.run_folder / "checkpoints").iterdir())
    assert written == [f"step-{step:08d}" for step in (2, 3, 6, 7)]
    assert [name for name, _ in session.reports] == written
    reported_at = [3, 6, 7, 7] if asynchronous else [2, 3, 6, 7]
    assert [step for _, step in session.reports] == reported_at


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_a_run_is_resumed_by_its_folder_alone(config, tmp_path, capsys, monkeypatch):
    """Options come from config.json; those that are given replace them, and are said."""
    longnet_dist.train(dataclasses.replace(config, steps=2))
    run = str(config.run_folder)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path.parent)
    assert app.main(["train", "--resume", run, "--steps", "4"]) == 0
    said = capsys.readouterr()
    assert f"resuming {run} with steps 4, which was 2" in said.err + said.out
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert app.main(["train", f"--resume={tmp_path}"]) == 2
    assert "holds no config.json; give the folder of a run" in capsys.readouterr().err


def test_a_new_folder_under_torchrun_has_a_date_and_is_found_again(tmp_path, monkeypatch):
    """torchrun --standalone makes an id of its own, which a restart keeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0d03356e-81ba-4d91-9d71-4c029e4b29aa")
    patience = Patience(timedelta(seconds=1))
    first = name_run_folder(TrainConfig(), patience)
    first.mkdir(parents=True)
    assert re.fullmatch(r"runs/\d{8}-\d{6}-0d03356e", str(first))
    assert name_run_folder(TrainConfig(), patience) == first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "my-job")
    assert str(name_run_folder(TrainConfig(), patience)) == "runs/my-job"
