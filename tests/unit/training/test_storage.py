"""A failure here means: a run in an object store is lost, or half a checkpoint there is taken for a checkpoint."""

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
from longnet_dist.checkpoints.storage import Store, copy, storage_path
from longnet_dist.cli import app
from longnet_dist.training.state import load_model
from tests.unit.conftest import TINY
from tests.unit.training.test_checkpoint import DAMAGES, newest, state

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def folder(bucket):
    """Checkpoints in a store after saves of steps 1, 2 and 3; those of 2 and 3 are left."""
    path = storage_path(f"{bucket}/runs/first/checkpoints")
    checkpoints = Checkpoints(path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(float(step)), {"step": step})
    return path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_path_names_a_file_system_or_a_store(tmp_path):
    assert storage_path("runs/first") == storage_path(storage_path("runs/first"))
    assert str(storage_path("file:///runs/first")) == "/runs/first"
    assert str(storage_path("s3://bucket/runs/first/")) == "s3://bucket/runs/first"
    config = TrainConfig(run_folder="s3://bucket/runs/first")
    assert json.loads(json.dumps(dataclasses.asdict(config), default=str))["run_folder"] == "s3://bucket/runs/first"
    with pytest.raises(ValueError, match="no store is known by nonsense://"):
        storage_path("nonsense://bucket/runs")
    with pytest.raises(ValueError, match="gcsfs"):
        storage_path("gs://bucket/runs")


def test_absolute_paths_name_the_same_files_from_any_folder(tmp_path, monkeypatch):
    """Paths as URLs, of home folders and across links, datasets, and run folders on disks and in stores."""
    (tmp_path / "elsewhere" / "texts").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    data = ("file:///data/text", "~/text", "link/../text", "some*.txt", "hf:books?split=train")
    absolute = TrainConfig(
        data=data, run_folder="runs/../first", cache="cache", tokenizer="t.json"
    ).with_absolute_paths()
    here = str(tmp_path)
    texts = ("/data/text", "/home/someone/text", f"{here}/link/../text", f"{here}/some*.txt")
    assert absolute.data == (*texts, "hf:books?split=train")
    assert (absolute.run_folder, absolute.cache) == (tmp_path / "first", tmp_path / "cache")
    assert absolute.tokenizer == tmp_path / "t.json"
    assert absolute.with_absolute_paths() == absolute
    in_store = TrainConfig(run_folder="s3://bucket/runs/first").with_absolute_paths()
    assert (str(in_store.run_folder), in_store.tokenizer) == ("s3://bucket/runs/first", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file or folder"),
        ("file://", "names no file or folder"),
        ("s3://", "s3:// names no bucket; s3://BUCKET/PREFIX does"),
        ("s3:///runs/first", "names no bucket"),
        ("gs://", "names no bucket"),
        ("memory://", "names no bucket"),
        ("://runs", "no store is known"),
        ("s3:/bucket/runs", "s3:/bucket/runs is no path on this machine"),
        (Path("s3://bucket/runs"), "is no path on this machine; only a run folder can be in a store, given as text"),
        ("~nobody-of-this-name/runs", "no home folder is known"),
    ],
)
def test_a_path_that_names_no_storage_raises(text, message):
    for use in (storage_path, lambda run_folder: TrainConfig(run_folder=run_folder)):
        with pytest.raises(ValueError, match=message):
            use(text)


@pytest.mark.parametrize("option", ["cache", "tokenizer"])
def test_paths_of_files_are_local(option, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert getattr(TrainConfig(**{option: "~/x.json"}), option) == Path("/home/somebody/x.json")
    for text in ("", "s3://bucket/x", "~nobody-of-this-name/x"):
        with pytest.raises(ValueError, match=r"names no file or folder|no path on this machine|no home folder"):
            TrainConfig(**{option: text})


def test_loads_the_newest_and_keeps_the_last_two(folder):
    assert newest(folder) == 3
    assert names(folder) == ["step-00000002", "step-00000003"]
    assert "manifest.json" in names(folder / "step-00000003")


@pytest.mark.parametrize("damage", ["a byte flipped", "a file gone", "no manifest", "half a manifest"])
def test_names_a_damaged_checkpoint_and_uses_the_one_before(folder, damage):
    do_damage, problem = DAMAGES[damage]
    do_damage(folder / "step-00000003")
    messages: list[str] = []
    assert newest(folder, messages) == 2
    if damage == "no manifest":  # So it is no checkpoint, like one that is being written.
        assert messages == []
    else:
        assert problem in messages[0]
    # The next checkpoint of this step replaces it.
    Checkpoints(folder).save(3, state(3.0), {"step": 3})
    assert newest(folder) == 3


def test_remains_of_a_crash_are_no_checkpoint_and_are_removed(folder):
    """Files of an unfinished checkpoint, and of an unfinished removal."""
    for name in ("step-00000001", "step-00000004"):
        copy(folder / "step-00000003" / "__0_0.distcp", folder / name / "__0_0.distcp")
    assert newest(folder) == 3
    Checkpoints(folder).save(5, state(5.0), {"step": 5})
    assert names(folder) == ["step-00000003", "step-00000005"]


def test_a_crash_at_any_moment_of_a_save_leaves_the_last_checkpoint(folder, monkeypatch):
    """The test interrupts the save at each call that changes the store, as if the process had ended there."""
    for method in ("begin", "put", "finish", "remove"):
        with monkeypatch.context() as patch:

            def end(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Store, method, end)
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(folder).save(4, state(4.0), {"step": 4})
        assert newest(folder) == (4 if method == "remove" else 3)


def test_an_unreachable_store_is_a_warning_in_a_save_and_an_error_in_a_resume(folder, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    unreachable = storage_path(str(folder))
    with pytest.warns(UserWarning, match=r"no checkpoint of step 4: .*EndpointConnectionError"):
        Checkpoints(unreachable).save(4, state(4.0), {"step": 4})
    with pytest.raises(RuntimeError, match=r"cannot be read: .*EndpointConnectionError"):
        Checkpoints(unreachable).newest()
    s3fs.S3FileSystem.clear_instance_cache()


class _Denied(BaseHTTPRequestHandler):
    """Answers every request as S3 does if the credentials do not allow it."""

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


def test_a_store_that_denies_a_listing_is_not_an_empty_one(folder, monkeypatch):
    import s3fs

    with ThreadingHTTPServer(("127.0.0.1", 0), _Denied) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        with pytest.raises(CheckpointError, match=r"cannot be read: PermissionError.*Access Denied"):
            Checkpoints(storage_path(str(folder))).newest()
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


def test_a_run_in_a_store_resumes_on_another_machine(config, tmp_path, capsys):
    """Another cache stands for another machine; the losses are exactly those of a run on a disk."""
    on_disk = train(dataclasses.replace(config, run_folder=tmp_path / "run"))
    train(config)
    folder = storage_path(config.run_folder)
    (folder / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    result = train(dataclasses.replace(config, cache=tmp_path / "other"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["loss"] for step in steps] == list(on_disk.losses)
    assert len(result.losses) == 2
    assert str(result.run_folder) == str(folder)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= set(names(folder))
    # Commands that read a run read one in a store, too.
    run, weights = str(folder), load_model(folder).state_dict()
    for arguments in (["eval", run, "--edges", "64"], ["report", run, "--out", tmp_path / "report.html"]):
        assert app.main(list(map(str, arguments))) == 0
    assert app.main(["export", run, str(tmp_path / "exported")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for name, x in load_model(str(folder)).state_dict().items():
        assert_close(x, weights[name])


def test_a_missing_bucket_raises_before_any_step(config):
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/run cannot be written: .*bucket"):
        train(dataclasses.replace(config, run_folder="s3://no-such-bucket/run"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ValueError, match=r"needs the package upath: pip install -e '.\[s3\]' in a checkout"):
        storage_path("s3://bucket/runs")
