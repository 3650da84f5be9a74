"""A failure here means: a run that is kept in an object store is lost, or half of a checkpoint there is believed."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch.testing import assert_close

from longnet_dist import TrainConfig, train
from longnet_dist.checkpoints.checkpoints import CheckpointError, Checkpoints
from longnet_dist.checkpoints.storage import Store, copy, place
from longnet_dist.cli import app
from longnet_dist.training.state import load_model
from tests.unit.test_checkpoint import DAMAGES, newest, state
from tests.unit.test_train import TINY

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def kept(bucket):
    """Three saves into a store, of steps 1, 2 and 3; the last two are kept."""
    folder = place(f"{bucket}/runs/first/checkpoints")
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, state(float(step)), {"step": step})
    return folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_path_names_a_file_system_or_a_store(tmp_path):
    assert place("runs/first") == place(place("runs/first"))
    assert str(place("file:///runs/first")) == "/runs/first"
    assert str(place("s3://bucket/runs/first/")) == "s3://bucket/runs/first"
    config = TrainConfig(run_folder="s3://bucket/runs/first")
    assert json.loads(json.dumps(dataclasses.asdict(config), default=str))["run_folder"] == "s3://bucket/runs/first"
    with pytest.raises(ValueError, match="no store is known by nonsense://"):
        place("nonsense://bucket/runs")
    with pytest.raises(ValueError, match="gcsfs"):
        place("gs://bucket/runs")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "names no file or folder"),
        ("file://", "names no file or folder"),
        ("s3://", "s3:// names no bucket; s3://BUCKET/PREFIX does"),
        ("s3:///runs/first", "names no bucket"),
        ("gs://", "names no bucket"),
        ("memory://", "names no bucket"),
        ("://runs", "no store is known"),
        ("s3:/bucket/runs", "s3:/bucket/runs is no path on this machine"),
        (Path("s3://bucket/runs"), "is no path on this machine; a run in a store is given as text"),
        ("~nobody-of-this-name/runs", "no home folder is known"),
    ],
)
def test_a_path_that_names_no_place_is_refused(given, said):
    for use in (place, lambda run_folder: TrainConfig(run_folder=run_folder)):
        with pytest.raises(ValueError, match=said):
            use(given)


@pytest.mark.parametrize("option", ["cache", "tokenizer"])
def test_paths_of_files_are_of_this_machine(option, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert getattr(TrainConfig(**{option: "~/x.json"}), option) == Path("/home/somebody/x.json")
    for given in ("", "s3://bucket/x", "~nobody-of-this-name/x"):
        with pytest.raises(ValueError, match=r"names no file or folder|no path on this machine|no home folder"):
            TrainConfig(**{option: given})


def test_the_newest_is_loaded_and_the_last_two_are_kept(kept):
    assert newest(kept) == 3
    assert names(kept) == ["step-00000002", "step-00000003"]
    assert "manifest.json" in names(kept / "step-00000003")


@pytest.mark.parametrize("damage", ["a byte flipped", "a file gone", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kept, damage):
    do, said_of_it = DAMAGES[damage]
    do(kept / "step-00000003")
    said: list[str] = []
    assert newest(kept, said) == 2
    if damage == "no manifest":  # The half of one that was being written, and so none.
        assert said == []
    else:
        assert said_of_it in said[0]
    # It is replaced whole when its step comes again.
    Checkpoints(kept).save(3, state(3.0), {"step": 3})
    assert newest(kept) == 3


def test_what_a_crash_left_is_no_checkpoint_and_is_removed(kept):
    """The files of one that was not finished, and of one whose removal was not."""
    for name in ("step-00000001", "step-00000004"):
        copy(kept / "step-00000003" / "__0_0.distcp", kept / name / "__0_0.distcp")
    assert newest(kept) == 3
    Checkpoints(kept).save(5, state(5.0), {"step": 5})
    assert names(kept) == ["step-00000003", "step-00000005"]


def test_a_crash_at_any_moment_of_a_save_leaves_the_last_whole(kept, monkeypatch):
    """After every call that changes the store, as if the process had ended there."""
    for method in ("begin", "put", "finish", "remove"):
        with monkeypatch.context() as patch:

            def end(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Store, method, end)
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(kept).save(4, state(4.0), {"step": 4})
        assert newest(kept) == (4 if method == "remove" else 3)


def test_a_store_that_fails_is_a_warning_and_an_unreachable_one_is_said(kept, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    folder = place(str(kept))
    with pytest.warns(UserWarning, match=r"no checkpoint of step 4: .*EndpointConnectionError"):
        Checkpoints(folder).save(4, state(4.0), {"step": 4})
    with pytest.raises(RuntimeError, match=r"cannot be read: .*EndpointConnectionError"):
        Checkpoints(folder).newest()
    s3fs.S3FileSystem.clear_instance_cache()


class _Denied(BaseHTTPRequestHandler):
    """Answers every request as S3 does where the credentials may not do it."""

    def do_GET(self):
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_may_not_be_listed_is_not_an_empty_one(kept, monkeypatch):
    import s3fs

    with ThreadingHTTPServer(("127.0.0.1", 0), _Denied) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        with pytest.raises(CheckpointError, match=r"cannot be read: PermissionError.*Access Denied"):
            Checkpoints(place(str(kept))).newest()
        server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def config(tmp_path, bucket):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text that repeats itself, and counts\n" for n in range(300)))
    return TrainConfig(
        data=str(text), seq_len=128, steps=4, warmup_steps=1, dtype="float64", checkpoint_every=2, validate_every=0,
        validation_sequences=2, run_folder=f"{bucket}/runs/first", cache=tmp_path / "cache", model=TINY,
    )  # fmt: skip


def test_a_run_goes_on_from_a_store_on_another_machine(config, tmp_path, capsys):
    """Another cache, so nothing that was on the first machine: the very losses of a run on a disk."""
    on_disk = train(dataclasses.replace(config, run_folder=tmp_path / "run"))
    train(config)
    folder = place(config.run_folder)
    (folder / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    result = train(dataclasses.replace(config, cache=tmp_path / "other"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["loss"] for step in steps] == list(on_disk.losses)
    assert len(result.losses) == 2
    assert str(result.run_folder) == str(folder)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= set(names(folder))
    # What reads a run reads one of a store.
    run, weights = str(folder), load_model(folder).state_dict()
    for arguments in (["eval", run, "--edges", "64"], ["report", run, "--out", tmp_path / "report.html"]):
        assert app.main(list(map(str, arguments))) == 0
    assert app.main(["export", run, str(tmp_path / "exported")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for name, x in load_model(str(folder)).state_dict().items():
        assert_close(x, weights[name])


def test_a_bucket_that_is_not_there_is_said_before_any_step(config):
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/run cannot be written: .*bucket"):
        train(dataclasses.replace(config, run_folder="s3://no-such-bucket/run"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ValueError, match=r"needs the package upath: pip install 'longnet-dist\[s3\]'"):
        place("s3://bucket/runs")
