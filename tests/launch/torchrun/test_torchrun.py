"""A failure here means: what a user types does not work, or training over ranks differs from training on one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tests.launch.jobs import forked, losses, run, train
from tests.unit.models.test_slide_encoder import published_weights

pytestmark = [pytest.mark.launch, pytest.mark.timeout(250)]


MULTIWAY = ("--model.multiway", "--model.multiway-first-id", 100)


@pytest.mark.parametrize(
    ("ranks", "seq_len", "options"),
    [
        (2, 256, ()),
        (4, 250, ("--keep-kv", "True", "--grad-accumulation", 2)),
        pytest.param(2, 250, ("--compile",), marks=(pytest.mark.slow, pytest.mark.exhaustive)),
        *(
            pytest.param(2, 250, options, marks=pytest.mark.slow)
            for options in (
                ("--async-checkpoints", "--checkpoint-every", 2),
                ("--model.activation-checkpointing", "selective"),
                ("--model.activation-checkpointing", "full", "--model.offload-activations"),
                ("--strategy", "exchange", "--model.num-kv-heads", 1),
                ("--objective", "mlm", "--model.position", "alibi", "--grad-accumulation", 2, *MULTIWAY),
            )
        ),
    ],
)
def test_training_over_ranks_equals_training_on_one(tmp_path, ranks, seq_len, options):
    """The seed and the data are the same; the curves are equal within rounding, for even and uneven chunks."""
    curves = {}
    for number, start in ((1, forked), (ranks, run if ranks == 2 else forked)):
        folder = tmp_path / f"run-{number}"
        done = start(number, *train(folder, "--steps", 6, "--seq-len", seq_len, *options))
        assert done.returncode == 0, done.stderr
        assert "byte-unigram model" in done.stdout
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        curves[number] = [*losses(folder), last["validation_bits_per_byte"]]
        assert (number > 1) == (0 < last["exposed_communication_seconds"] < last["seconds"])
    assert curves[1][5] < curves[1][0]
    assert curves[ranks] == pytest.approx(curves[1], rel=1e-10)


@pytest.mark.parametrize(
    ("dtype", "stops", "options"),
    [
        ("bfloat16", (3, 6), ("--grad-accumulation", 2)),
        pytest.param("float32", (6,), ("--autocast", "True"), marks=pytest.mark.slow),
    ],
)
def test_low_precision_over_ranks_is_near_one_process(tmp_path, dtype, stops, options):
    """With bfloat16 parameters, FSDP sums gradients in float32; a second start resumes from the float32 weights."""
    curves = []
    for ranks in (1, 2):
        folder = tmp_path / f"run-{ranks}"
        for steps in stops:
            command = train(folder, "--steps", steps, "--seq-len", 256, *options)
            done = forked(ranks, *[(dtype if word == "float64" else word) for word in command])
            assert done.returncode == 0, done.stderr
        curves.append(losses(folder))
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


@pytest.mark.slow
def test_measured_hardware_chooses_strategies(tmp_path):
    """Ranks measure together, and one writes the file, which a run and a plan read."""
    path = tmp_path / "measured.json"
    done = forked(2, "-m", "longnet_dist", "calibrate", "--out", path, "--rows", 256)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("microseconds a collective") == 1
    assert json.loads(path.read_text()).keys() == {"name", "flops", "bandwidth", "latency"}
    done = forked(2, *train(tmp_path / "run", "--steps", 2, "--seq-len", 250, "--hardware", path))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
    done = forked(1, "-m", "longnet_dist", "plan", "--hardware", path)
    assert "an estimate for measured" in done.stdout


@pytest.mark.slow
def test_separate_documents_over_ranks_are_those_of_one_process(tmp_path):
    """Lines are documents; some cross ranks. The losses are not those of joined documents."""
    lines = "".join(json.dumps({"text": f"document {n} " * (n % 9)}) + "\n" for n in range(400))
    (tmp_path / "text.jsonl").write_text(lines)
    curves = {}
    for ranks, kind in ((1, "separate"), (2, "separate"), (1, "joined")):
        folder = tmp_path / f"run-{ranks}-{kind}"
        options = ("--data", tmp_path / "text.jsonl", "--steps", 6, "--seq-len", 250, "--grad-accumulation", 2)
        options += ("--batch-size", 2)
        done = forked(ranks, *train(folder, *options, "--documents", kind))
        assert done.returncode == 0, done.stderr
        curves[ranks, kind] = losses(folder)
    assert curves[2, "separate"] == pytest.approx(curves[1, "separate"], rel=1e-10)
    assert curves[1, "joined"] != pytest.approx(curves[1, "separate"], rel=1e-3)


@pytest.mark.slow
def test_a_run_with_dropout_over_ranks_resumes_bit_for_bit(tmp_path):
    """Each rank draws its own dropout, which its checkpoint restores."""
    curves = []
    for name, stops in (("whole", (6,)), ("again", (3, 6))):
        for steps in stops:
            options = ("--steps", 6, "--seq-len", 256, "--checkpoint-every", 3, "--model.dropout", 0.2)
            options = (*options, "--keep-checkpoints", 9)
            done = forked(2, *train(tmp_path / name, *options))
            assert done.returncode == 0, done.stderr
            if steps == 3:
                shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
        curves.append(losses(tmp_path / name))
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_bad_data_fails_with_a_message(tmp_path):
    done = run(2, "-m", "longnet_dist", "train", "--data", "nothing-there/", "--run-folder", tmp_path)
    assert done.returncode != 0
    assert "longnet-dist: --data nothing-there/: no such file" in done.stderr


@pytest.mark.slow
def test_the_example_gives_the_same_numbers_on_any_number_of_ranks():
    jobs = ((run, 1), (run, 2), (forked, 4))
    outputs = {start(n, "examples/attention.py").stdout.split(":")[1] for start, n in jobs}
    assert len(outputs) == 1
    assert "dq" in outputs.pop()


def test_evaluation_and_scores_over_ranks_are_those_of_one_process(tmp_path):
    """A run is evaluated and a file scored by two ranks, of which one prints."""
    done = forked(1, *train(tmp_path / "run", "--steps", 2, "--seq-len", 250))
    assert done.returncode == 0, done.stderr
    for arguments in (
        ("eval", tmp_path / "run", "--edges", 64, "--sequences", 2),
        ("score", tmp_path / "text.txt", "--model", tmp_path / "run", "--json"),
    ):
        one, two = (forked(ranks, "-m", "longnet_dist", *arguments) for ranks in (1, 2))
        assert two.returncode == 0, two.stderr
        if arguments[0] == "eval":
            assert two.stdout == one.stdout
            assert one.stdout.count("tokens seen") == 1
        else:
            (scores, of_one) = (json.loads(job.stdout) for job in (two, one))
            assert scores["log_likelihood"] == pytest.approx(of_one["log_likelihood"], rel=1e-10)


def test_a_mistake_under_torchrun_is_said_by_one_rank_and_in_its_report(tmp_path):
    job = run(2, *train(tmp_path / "run", "--seq-len", 10**9))
    assert job.returncode != 0
    message = "longnet-dist: the training part of the data is"
    lines = [line for line in job.stderr.splitlines() if message in line]
    assert sum(line.startswith(message) for line in lines) == 1
    assert any("traceback :" in line for line in lines)


def test_slides_over_ranks(tmp_path):
    """The ranks of torchrun share a slide, and one writes; the numbers are those of one process."""
    torch.save({"model": published_weights()}, tmp_path / "weights.pth")
    features, coords = torch.randn(50, 12), 256 * torch.randint(100, (50, 2))
    np.savez(tmp_path / "slide.npz", features=features.numpy(), coords=coords.numpy())
    embeddings = {}
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        options = ("--weights", tmp_path / "weights.pth", "--out", out, "--all-layers")
        done = forked(ranks, "-m", "longnet_dist", "embed-slides", tmp_path / "slide.npz", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("50 tiles") == 1
        embeddings[ranks] = dict(np.load(out / "slide.npz"))
    assert embeddings[1]["layers"].shape == (3, 32)
    for name in ("embedding", "layers"):
        assert embeddings[2][name] == pytest.approx(embeddings[1][name], abs=1e-5)
