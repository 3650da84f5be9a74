"""A failure here means: the command line does not do what its help says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import longnet_dist
from longnet_dist import LongNetConfig, TrainConfig
from longnet_dist.cli import app
from longnet_dist.training.config import RayConfig
from longnet_dist.training.parallel import ParallelConfig


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("options", [[], ["--ranks", "4", "--heads", "6"], ["--no-causal", "--head-phases", "blocked"]])
def test_draw(tmp_path, ending, options, capsys):
    out = tmp_path / f"pattern.{ending}"
    assert app.main(["draw", "--out", str(out), *options]) == 0
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "100000"], "a picture shows 1 to 1024 tokens"),
        (["--dilation-rates", "1", "2"], "segment_lengths has 3 entries"),
        (["--out", "pattern.xyz"], "ends in .png, .svg or .pdf"),
    ],
)
def test_errors_are_one_line_and_exit_2(options, message, capsys):
    assert app.main(["draw", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("pattern.xyz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--ranks", "0"], "--ranks is 0"),
        (["plan", "--seq-len", "-5"], "--seq-len is -5"),
        (["plan", "--kv-heads", "3"], "must divide --heads 8"),
        (["plan", "--kv-heads", "0"], "--kv-heads is 0"),
        (["draw", "--heads", "0"], "--heads is 0"),
        (["draw", "--out", "no-such-folder/x.png"], "no-such-folder"),
        (["draw", "--out", "noending"], "ends in .png"),
        (["train", "--run-folder", "pyproject.toml"], "pyproject.toml"),
        (["train", "--model.vocab-size", "100"], "vocab_size is 100"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, capsys):
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --ranks 4", "--ranks is 4, but no launcher starts them: give --launcher ray, or leave"),
        ("train --ranks 0", "--ranks is 0"),
        ("train --ray.min-ranks 2 --ranks 1", "--ray.* options need --launcher ray"),
        ("train --data", "--data has no value"),
        ("train --data --steps 1", "--data has no value"),
        ("eval run --edges", "--edges has no value"),
        ("train --launcher ray --run-folder x --ray.labels", "--ray.labels has no value"),
        ("tokenize --out x", "no data to tokenise"),
        ("train --run-folder s3://", "s3:// names no bucket"),
        ("eval s3://", "s3:// names no bucket"),
        ("export gs:///run out", "gs:///run names no bucket"),
        ("report s3://", "s3:// names no bucket"),
        ("tokenize README.md --out s3://bucket/tokens", "s3://bucket/tokens is no path on this machine"),
        ("train --cache s3://bucket/cache", "s3://bucket/cache is no path on this machine"),
        ("train --data s3://bucket/text", "s3://bucket/text is no path on this machine"),
        ("draw --out=s3://bucket/x.png", "s3://bucket/x.png is no path on this machine"),
        ("draw --out=~nobody-of-this-name/x.png", "no home folder is known"),
        ("train --data hf:", "hf: names no dataset"),
        *((f"{command} {option}", f"{option} is empty") for command, options in {
            "train": ("--data", "--run-folder", "--cache", "--tokenizer", "--text-field", "--run_folder"),
            "tokenize README.md": ("--out", "--tokenizer"),
            "eval run": ("--data", "--tokenizer"),
            "report run": ("--out",),
            "draw": ("--out",),
        }.items() for option in options),
        *((command, f"an argument of {command} is empty") for command in ("tokenize", "eval", "export", "report")),
    ],
)  # fmt: skip
def test_empty_values_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    """Rows whose message is that something is empty run twice: with `--option ""` and with `--option=`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("text")
    words = arguments.split()
    for command in ([*words, ""], [*words[:-1], f"{words[-1]}="]) if "is empty" in message else [words]:
        if command[-1] != f"{words[0]}=":
            assert app.main(command) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, capsys):
    """The path follows a space or `=`; the shell does not expand `~` after `=`."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "here")
    (home / "data" / "text.txt").write_text("some words again\n" * 200)
    model = "--model.d-model 16 --model.num-layers 1 --model.num-heads 2 --model.segment-lengths 32"
    for command in (
        "tokenize ~/data --out=~/tokens",
        f"train --data=~/tokens --cache=~/cache --run-folder=~/run --seq-len 32 --steps 1 {model} "
        "--model.dilation-rates 1",
        "eval ~/run --edges 32 --data ~/tokens",
        "export ~/run ~/exported",
        "report ~/run --out=~/report.html",
        "draw --out=~/pattern.svg",
        "draw --out ~/pattern.png",
    ):
        assert app.main(command.split()) == 0, capsys.readouterr().err
    outputs = {"tokens", "cache", "run", "exported", "report.html", "pattern.svg", "pattern.png"}
    assert {path.name for path in home.iterdir()} == {"data", *outputs}
    assert not list((tmp_path / "here").iterdir())


def test_ranks_must_be_those_of_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("longnet_dist.training.trainer.train", lambda config: None)
    assert app.main(["train", "--ranks", "2"]) == 0
    assert app.main(["train", "--ranks", "3"]) == 2


def test_doctor(capsys):
    assert app.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for expected in ("torch 2.", "gloo: usable", "cpu   float32   torch: the flash attention", "\n  cuda  "):
        assert expected in report


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--device", "cpu"], "for torch.float32 on cpu with head dim 64:\n  flash  no: it runs on CUDA, not on cpu\n"),
        (["--device", "cpu", "--bias"], 'eager  usable, and taken by kernel="auto"'),
        (["--capability", "9.0", "--head-dim", "128"], "for torch.bfloat16 on cuda with head dim 128, compute"),
        (["--capability", "9.0", "--dtype", "float64"], 'eager  usable, and taken by kernel="auto"'),
        (["--capability", "7.5"], "torch  no: it needs a GPU of compute capability 8.0 or above"),
    ],
)
def test_doctor_explains_which_kernel_a_call_takes(options, expected, capsys):
    assert app.main(["doctor", *options]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--capability", "9"], "two numbers, such as 9.0"),
        (["--capability", "9.0", "--device", "cpu"], "only GPUs have a compute capability"),
        (["--head-dim", "0"], "at least 1"),
    ],
)
def test_doctor_reports_options_that_cannot_work(options, rule, capsys):
    assert app.main(["doctor", *options]) == 2
    assert rule in capsys.readouterr().err


def test_plan(capsys):
    pattern = ["--segment-lengths", "2048", "8192", "32768", "--dilation-rates", "1", "4", "16"]
    assert app.main(["plan", "--ranks", "4", *pattern, "--strategy", "all_gather", "--keep-kv", "False"]) == 0
    costs = capsys.readouterr().out
    assert re.search(r"8,192 +4 +100.00% +0 +local +nothing +nothing", costs)
    assert re.search(r"32,768 +16 +50.00% +3 +all_gather +12.0 MiB +12.0 MiB", costs)
    assert "90.2 GFLOP" in costs


def test_a_plan_proposes_patterns_and_draws_scaling(capsys, tmp_path):
    sizes = ["--seq-len", "1M", "--ranks", "16", "--pattern", "2K:1,8192:4,2^20:512"]
    assert app.main(["plan", *sizes, "--propose", "--plot", str(tmp_path / "plan.png")]) == 0
    costs = capsys.readouterr().out
    assert re.search(r"1,048,576 +512 +1.56%", costs)
    assert "proposals for --pattern, within the budget" in costs
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert app.main(["plan", *sizes, "--propose", "--max-flops", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proposals"] == []
    for wrong, message in (
        (["--max-flops", "1e12"], "are budgets of --propose"),
        (["--pattern", "2048"], "write LENGTH:RATE for each branch"),
        (["--seq-len", "1.5"], "'1.5' is not a whole number"),
        (["--pattern", "8:1", "--segment-lengths", "8", "--dilation-rates", "1"], "leave out --segment-lengths"),
    ):
        assert app.main(["plan", *wrong]) != 0
        assert message in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())


def test_a_plan_of_a_million_tokens_reaches_all_and_names_idle_ranks(capsys):
    assert app.main(["plan", "--seq-len", "1048576", "--ranks", "65"]) == 0
    costs = capsys.readouterr().out
    assert "a token sees at most 1,048,576 tokens\nrank 64 is idle" in costs
    assert app.main(["plan", "--seq-len", "1048576", "--segment-lengths", "2048", "--dilation-rates", "1"]) == 0
    assert "no token sees the whole sequence" in capsys.readouterr().out
    assert app.main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reach"] == 32768


def test_a_report_names_runs_apart_and_shows_their_options_side_by_side(tmp_path):
    """Two runs have folders of one name; axes have units, and the validation has the unigram model's line."""
    for parent, rate in (("a", 0.1), ("b", 0.2)):
        run = tmp_path / parent / "run"
        run.mkdir(parents=True)
        steps = [{"step": n, "tokens": n * 100_000, "bits_per_byte": 8.0 / n} for n in (1, 2)]
        steps[1] |= {"validation_bits_per_byte": 4.0, "unigram_bits_per_byte": 4.6}
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (run / "config.json").write_text(json.dumps({"learning_rate": rate, "seed": 0, "model": {"d_model": 8}}))
    runs = [str(tmp_path / parent / "run") for parent in ("a", "b")]
    out = tmp_path / "report.html"
    assert app.main(["report", *runs, "--out", str(out), "--smoothing", "0.5"]) == 0
    page = out.read_text()
    assert "<td>learning_rate</td><td>0.1</td><td>0.2</td>" in page
    assert "seed" not in page
    for text in ("a/run", "b/run", "unigram model of a/run", "200k"):
        assert f"<!-- {text} -->" in page, text
    assert app.main(["report", *runs, "--smoothing", "1"]) == 2


def test_tokenising_what_is_done_says_so(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text")
    command = ["tokenize", str(tmp_path / "text.txt"), "--out", str(tmp_path / "tokens")]
    for expected in (False, True):
        assert app.main(command) == 0
        assert ("already holds all tokens" in capsys.readouterr().out) is expected


def test_the_table_of_a_report_has_units(tmp_path):
    """No value is in scientific notation."""
    metrics = {"step": 1_000_000, "tokens": 1 << 34, "loss": 1.25, "mfu": 0.4567}
    metrics |= {"tokens_per_second": 12_345_678.9, "peak_memory_bytes": 7_460_010_000}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    assert app.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    table = (tmp_path / "report.html").read_text().partition("</table>")[0]
    values = re.findall("<td>([^<]*)</td>", table)[1:]
    assert values == ["1,000,000", "17,179,869,184", "1.25", "", "12,345,679", "45.7%", "6.9 GiB"]


def test_version(capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"longnet-dist {longnet_dist.__version__}\n"


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit):
        app.main(["train", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        if field.name != "model":
            assert f"--{field.name.replace('_', '-')}" in text
    for field in dataclasses.fields(LongNetConfig):
        assert f"--model.{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("config", [TrainConfig, ParallelConfig, LongNetConfig, RayConfig])
def test_the_help_of_an_option_has_no_line_breaks_of_the_source(config):
    for field in dataclasses.fields(config):
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]


def test_no_option_is_taken_by_torchrun():
    """torchrun reads abbreviations of its own options even after the module's name: --run would be one."""
    from torch.distributed.run import get_args_parser

    torchruns = {o for action in get_args_parser()._actions for o in action.option_strings}
    ours = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)]
    assert not [o for o in ours if any(t.startswith(o) for t in torchruns)]
