"""A failure here means: a run in one process does not train, or does not record what it did."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import longnet_dist
from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.cli import app
from longnet_dist.training.job import read_config
from longnet_dist.training.state import load_model
from tests.unit.conftest import TINY


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_a_run_writes_its_folder(config, capsys):
    result = longnet_dist.train(config)
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "tokens", "tokens_per_second", "lr", "grad_norm"} <= line.keys() for line in lines)
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert ["validation_bits_per_byte" in line for line in lines] == [False, False, True] * 2
    assert tuple(line["loss"] for line in lines) == result.losses
    saved = json.loads((config.run_folder / "config.json").read_text())
    assert saved["model"]["d_model"] == 16
    assert saved["seq_len"] == 128
    assert saved["model"]["num_kv_heads"] == 2
    assert saved["model"]["ffn_dim"] == 64
    assert saved["ranks"] == 1
    assert list(config.run_folder.glob("events.out.tfevents.*"))
    output = capsys.readouterr().out
    assert "bits per byte; byte-unigram model" in output
    assert "tokens/s" in output
    assert output.startswith(f"reading {config.data[0]}")
    shown = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == [f"{n}/6" for n in range(1, 7)]
    assert all(f"loss {known['bits_per_byte']:.3f} bits" in line for line, known in zip(shown, lines, strict=True))
    model = load_model(config.run_folder)
    assert model(torch.zeros(1, 10, dtype=torch.int64)).shape == (1, 10, 257)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_the_first_step_of_many_is_shown(config, capsys):
    longnet_dist.train(dataclasses.replace(config, steps=60, validate_every=0))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == [f"{n}/60" for n in (1, *range(3, 61, 3))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_accumulating_gradients_equals_larger_batches(config):
    base = {"dtype": "float64", "steps": 3}
    one = longnet_dist.train(dataclasses.replace(config, **base, batch_size=4))
    other = config.run_folder.with_name("other")
    many = longnet_dist.train(dataclasses.replace(config, **base, batch_size=2, grad_accumulation=2, run_folder=other))
    assert one.losses == pytest.approx(many.losses, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_training_learns(config):
    result = longnet_dist.train(dataclasses.replace(config, steps=60, learning_rate=1e-2, autocast=True))
    assert result.validation_bits_per_byte < result.unigram_bits_per_byte


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ("nothing-there/",)}, "no such file"),
        ({"seq_len": 10**6}, "one sequence with the token after it is 1000001"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"documents": "apart"}, "documents is 'apart'; it must be joined or separate"),
        ({"validation_fraction": 1.5}, "must lie between 0 and 1"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0; it must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"dtype": "int32"}, "one of float32, float64, bfloat16"),
        ({"keep_checkpoints": 1}, "keep_checkpoints is 1; it must be at least 2"),
    ],
)
def test_bad_options_raise_before_any_step(config, change, message):
    with pytest.raises(ValueError, match=message):
        longnet_dist.train(dataclasses.replace(config, **change))


def test_paths_may_be_strings(tmp_path):
    config = TrainConfig(data="some/folder", run_folder="run", cache="cache")
    assert config.data == ("some/folder",)
    assert config.run_folder == Path("run")
    assert config.cache == Path("cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "learned"}, "'learned'; it must be one of rotary, xpos, alibi, t5, none"),
        ({"activation_checkpointing": "some"}, "one of none, selective, full"),
        ({"kernel": "fast"}, "one of auto, flash, torch, triton, eager, cudnn"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_models_raise(change, message):
    with pytest.raises(ValueError, match=message):
        LongNetConfig(**change)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_traces_folder_does_not_end_the_run(config, monkeypatch, replaced):
    """The run creates the folder again. If a file is in its place, there is one warning."""
    from longnet_dist.training.measures import step_metrics

    traces = config.run_folder / "traces"

    def remove(config, step, *rest):
        if step == 2:
            shutil.rmtree(traces)
            if replaced:
                traces.touch()
        return step_metrics(config, step, *rest)

    monkeypatch.setattr(sys.modules["longnet_dist.training.trainer"], "step_metrics", remove)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert longnet_dist.train(config).step == 6
    messages = [str(w.message) for w in caught if "traces of ranks that hang may be missing" in str(w.message)]
    assert len(messages) == replaced
    assert (traces / "rank-0.txt").exists() != replaced


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_eval_export_and_report_of_a_run(config, tmp_path, capsys):
    from longnet_dist import LongNet

    longnet_dist.train(config)
    run = str(config.run_folder)
    capsys.readouterr()
    assert app.main(["eval", run, "--edges", "32", "64", "--sequences", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:3] for row in rows] == [["1", "to", "32"], ["33", "to", "64"], ["65", "to", "128"]]
    assert app.main(["export", run, str(tmp_path / "exported")]) == 0
    tokens = torch.randint(257, (1, 50))
    exported, trained = LongNet.from_pretrained(tmp_path / "exported"), load_model(config.run_folder)
    torch.testing.assert_close(exported(tokens), trained(tokens), rtol=0, atol=0)
    assert app.main(["report", run, run, "--out", str(tmp_path / "report.png")]) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert app.main(["eval", str(tmp_path)]) == 2
    assert app.main(["report", str(tmp_path)]) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_an_export_is_complete(config, tmp_path, capsys, monkeypatch):
    """It has the tokenizer and ordinary permissions, loads in eval mode, and works where a run does."""
    from longnet_dist import LongNet, load_tokenizer

    (tmp_path / "a.txt").write_text("what is said here is said again. " * 400)
    vocabulary = {word: n for n, word in enumerate(["what", "is", "said", "here", "again", ".", "<|endoftext|>"])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, data=("a.txt",), tokenizer=Path("words.json"), seq_len=32)
    longnet_dist.train(config)
    run, export = str(config.run_folder), tmp_path / "exported"
    with pytest.raises(ValueError, match="is a run; export its model first: longnet-dist export"):
        LongNet.from_pretrained(run)
    assert app.main(["export", run, str(export)]) == 0
    assert {path.name for path in export.iterdir()} == {"config.json", "model.safetensors", "words.json"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in export.iterdir() if path.name != "words.json")
    about = json.loads((export / "config.json").read_text())["tokenizer"]
    assert about["end_of_document"] == 6
    assert about["name"] == load_tokenizer(str(export / "words.json")).name
    model = LongNet.from_pretrained(export)
    assert not model.training
    text = "what is said again ."
    scores = model.score(text)
    ids = torch.tensor([0, 1, 2, 4, 5])
    expected = model(ids[None, :-1]).log_softmax(-1)[0, range(4), ids[1:]]
    torch.testing.assert_close(scores, expected)
    (tmp_path / "scored").write_text(text)
    capsys.readouterr()
    for folder in (run, str(export)):
        assert app.main(["score", "scored", "--model", folder, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["log_likelihood"] == pytest.approx(scores.sum().item(), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(-scores.sum().item() / math.log(2) / len(text), rel=1e-5)
    assert app.main(["eval", str(export)]) == 2
    assert "give --data" in capsys.readouterr().err
    assert app.main(["eval", str(export), "--data", "a.txt", "--seq-len", "32"]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_eval_refuses_data_that_changed_and_finds_it_from_elsewhere(config, tmp_path, capsys, monkeypatch):
    """Other tokens would be held out, among them some that the run was trained on."""
    text = tmp_path / "a.txt"
    text.write_text("what is said here is said again. " * 400)
    monkeypatch.chdir(tmp_path)
    longnet_dist.train(dataclasses.replace(config, data=("a.txt",)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert app.main(["eval", str(config.run_folder)]) == 0
    text.write_text("something else is said now. " * 400)
    assert app.main(["eval", str(config.run_folder)]) == 2
    assert "have changed since it was trained" in capsys.readouterr().err
    assert app.main(["eval", str(config.run_folder), "--data", str(text)]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_eval_by_position_adds_up_to_the_validation(config):
    from longnet_dist.inference.evaluate import bits_by_position
    from longnet_dist.training.job import load_corpus

    result = longnet_dist.train(config)
    held_out = load_corpus(config).validation
    (whole,) = bits_by_position(load_model(config.run_folder), held_out, 128, 2, ())
    assert whole[:2] == (0, 128)
    assert whole[2] == pytest.approx(result.validation_bits_per_byte, rel=1e-5)


def test_options_of_an_older_run_are_read(tmp_path):
    """One option had another name then, and one did not exist."""
    saved = json.loads(json.dumps(dataclasses.asdict(TrainConfig(seq_len=99, max_skipped_steps=7)), default=str))
    del saved["io_timeout"]
    saved["most_skipped"] = saved.pop("max_skipped_steps")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = read_config(tmp_path)
    assert (config.seq_len, config.max_skipped_steps, config.io_timeout) == (99, 5, 3600.0)


def test_weights_of_another_model_raise(tmp_path):
    from longnet_dist import LongNet

    TINY.build().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"d_model": 32}))
    with pytest.raises(ValueError, match=r"is not of the model in config.json: embedding.weight"):
        LongNet.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_measures_and_a_profile(config):
    import gzip

    longnet_dist.train(dataclasses.replace(config, profile=True, peak_tflops=0.5, steps=3))
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tflops_per_rank"] / 0.5)
        assert 0 < line["data_seconds"] < line["seconds"]
        assert line["exposed_communication_seconds"] == 0  # One process waits for nobody.
        assert line["peak_memory_bytes"] > 10**7
        assert line["attention_bytes_received"] == 0
    trace = json.loads(gzip.decompress((config.run_folder / "traces" / "profile-rank-0.json.gz").read_bytes()))
    assert any("dilated_attention" in event.get("name", "") for event in trace["traceEvents"])


def test_operations_of_a_step_are_counted():
    from longnet_dist.training.measures import step_flops

    model = LongNetConfig(d_model=8, num_layers=3, num_heads=2, segment_lengths=(16,), dilation_rates=(1,))
    config = TrainConfig(seq_len=16, batch_size=2, grad_accumulation=5, model=model)
    parameters = sum(p.numel() for p in model.build().parameters())
    attention = 4 * 8 * 16 * 17 / 2  # 4 D per head and visible pair, causal
    assert step_flops(config, model.build()) == 10 * (6 * parameters * 16 + 3.5 * 3 * attention)
    two_kinds = dataclasses.replace(model, multiway=True, multiway_first_id=100)  # Each token uses one of both weights.
    assert step_flops(dataclasses.replace(config, model=two_kinds), two_kinds.build()) == step_flops(
        config, model.build()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_and_biases(config, monkeypatch):
    """The test uses the real package, offline."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    longnet_dist.train(dataclasses.replace(config, wandb="project", steps=2))
    assert wandb.run is None
    (written,) = (config.run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # Another process writes it, and may still do so.
    while b"bits_per_byte" not in written.read_bytes():
        assert time.monotonic() < deadline, f"{written} holds no metrics"
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_trains_on_a_folder_of_tokens(config, tmp_path, capsys):
    """The folder is made by the command with a real tokenizer; too small a vocabulary raises before any step."""
    from tokenizers import ByteLevelBPETokenizer

    text = (tmp_path / "text" / "0.txt").read_text()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=270, special_tokens=["<|endoftext|>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    command = ["tokenize", str(tmp_path / "text"), "--out", str(tmp_path / "tokens"), "--shard-tokens", "500"]
    assert app.main([*command, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert "4 documents" in capsys.readouterr().out
    config = dataclasses.replace(config, data=(str(tmp_path / "tokens"),), seq_len=32)
    with pytest.raises(ValueError, match=r"vocab_size is 100, and .*tokenizer.json.* need 270: --model.vocab-size 270"):
        longnet_dist.train(dataclasses.replace(config, model=dataclasses.replace(TINY, vocab_size=100)))
    (tmp_path / "other.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"is tokenised by tokenizer.json \w+, and --tokenizer is"):
        longnet_dist.train(dataclasses.replace(config, tokenizer=tmp_path / "other.json"))
    result = longnet_dist.train(config)
    assert read_config(config.run_folder).model.vocab_size == 270
    line = json.loads((config.run_folder / "metrics.jsonl").read_text().splitlines()[0])
    ratio = line["bits_per_byte"] * 0.6931471805599453 / line["loss"]
    assert 0.05 < ratio < 0.7
    capsys.readouterr()
    text = str(tmp_path / "text")
    assert app.main(["eval", str(config.run_folder), "--data", text]) == 2
    assert "the run's tokens are by tokenizer.json" in capsys.readouterr().err
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--edges", "16"]
    assert app.main(["eval", str(config.run_folder), "--data", text, *options]) == 0
    assert "1 to     16" in capsys.readouterr().out
    assert app.main(["export", str(config.run_folder), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert result.validation_bits_per_byte < 8.1 * ratio


def test_report_in_html_and_of_a_run_that_was_interrupted(tmp_path, capsys):
    lines = [{"step": n, "tokens": 10 * n, "loss": 5.0 / n, "tokens_per_second": 3.0} for n in (1, 2)]
    (tmp_path / "run<1>").mkdir()
    path = tmp_path / "run<1>" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert app.main(["report", str(path.parent), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "run&lt;1&gt;" in page
    assert "<td>2.5</td>" in page
    assert app.main(["report", str(path.parent), "--out", "report.xyz"]) == 2
    path.write_text("no json\n")
    assert app.main(["report", str(path.parent), "--out", str(tmp_path / "report.html")]) == 2
    assert "cannot be read" in capsys.readouterr().err
