"""A failure here means: on the command line, a text is continued or read as a stream otherwise than by the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from longnet_dist import LongNet, LongNetConfig
from longnet_dist.cli import app
from longnet_dist.inference.embed import embeddings


@pytest.fixture
def export(tmp_path, monkeypatch):
    """The folder of an exported model, beside a file of text, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LongNetConfig(d_model=16, num_layers=1, num_heads=2, segment_lengths=(8, 64), dilation_rates=(1, 4))
    config.build().save_pretrained("model")
    (tmp_path / "text").write_bytes(bytes(i * i % 251 for i in range(300)))
    return "model"


@pytest.mark.parametrize("prompt", [["--prompt", "one text"], ["--prompt-file", "text"]])
def test_generate_continues_a_text(export, prompt, capsys):
    arguments = ["generate", export, *prompt, "--max-new-tokens", "20", "--temperature", "1", "--seed", "3"]
    assert app.main(arguments) == 0
    text = b"one text" if prompt[0] == "--prompt" else Path("text").read_bytes()
    ids = torch.tensor(list(text))[None]
    expected = LongNet.from_pretrained(export).generate(ids, 20, temperature=1.0, seed=3, stop=[256])[0, len(text) :]
    text = bytes(i for i in expected.tolist() if i < 256).decode(errors="replace")
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text to continue, by --prompt or --prompt-file"),
        (["--prompt", "a", "--prompt-file", "text"], "by --prompt or --prompt-file"),
        (["--prompt-file", "missing"], "--prompt-file missing is no file"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_mistakes_of_generate_are_one_line(export, arguments, message, capsys):
    assert app.main(["generate", export, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_eval_and_score_read_a_file_as_a_stream(export, capsys):
    assert app.main(["eval", export, "--stream", "text", "--edges", "100", "--state", "state"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    scores = LongNet.from_pretrained(export).score(Path("text").read_bytes())
    for row, part in zip(rows, (scores[:100], scores[100:]), strict=True):
        assert float(row[3]) == pytest.approx(-part.double().mean().item() / math.log(2), abs=2e-3)
    assert app.main(["score", "text", "--model", export, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 299
    assert found["log_likelihood"] == pytest.approx(scores.double().sum().item(), rel=1e-5)
    assert app.main(["score", "text", "--model", export, "--json", "--state", "state"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embed_writes_the_embedding_of_each_file(export, pooling, capsys):
    Path("short").write_bytes(b"a")
    arguments = ["embed", "text", "short", "--model", export, "--out", "vectors", "--pooling", pooling]
    assert app.main(arguments) == 0
    assert capsys.readouterr().out == "vectors/text.npy written\nvectors/short.npy written\n"
    model = LongNet.from_pretrained(export)
    for name in ("text", "short"):
        expected = embeddings(model, torch.tensor(list(Path(name).read_bytes()))[None], pooling=pooling)[0]
        assert_close(torch.from_numpy(np.load(f"vectors/{name}.npy")), expected)
    Path("vectors/text.npy").unlink()
    assert app.main(arguments) == 0
    assert "vectors/short.npy exists; remove it to embed the file again" in capsys.readouterr().out
    assert sorted(path.name for path in Path("vectors").iterdir()) == ["short.npy", "text.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "text", "text", "--state", "state"], "--state is for one file, without --tokens"),
        (["score", "text", "--tokens", "--state", "state"], "--state is for one file, without --tokens"),
        (["embed", "text", "folder/text", "--out", "vectors"], "would both become text.npy"),
        (["embed", "missing", "--out", "vectors"], "missing is no file"),
        (["embed", "empty", "--out", "vectors"], "empty has 0 tokens"),
    ],
)
def test_mistakes_of_score_and_embed_are_one_line(export, arguments, message, capsys):
    Path("folder").mkdir()
    Path("folder/text").write_text("other")
    Path("empty").touch()
    assert app.main([*arguments, "--model", export]) == 2
    assert message in capsys.readouterr().err


def test_a_stream_is_read_by_the_tokenizer_of_the_model(tmp_path, monkeypatch, capsys):
    """Bits per byte are those of `score`, which encodes the file, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world of long text and more text"] * 50, trainer)
    tokenizer.save("tokenizer.json")
    Path("text").write_text("hello world of text " * 20)
    config = LongNetConfig(300, 16, 1, 2, segment_lengths=(8, 64), dilation_rates=(1, 4))
    config.build().save_pretrained("model", "tokenizer.json")
    assert app.main(["score", "text", "--model", "model", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert app.main(["eval", "model", "--stream", "text"]) == 0
    bits = float(capsys.readouterr().out.splitlines()[1].split()[3])
    assert found["tokens"] < 200
    assert bits == pytest.approx(found["bits_per_byte"] * (found["tokens"] + 1) / found["tokens"], abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "state"], "--state is for --stream"),
        (["--stream", "missing"], "--stream missing is no file"),
        (["--stream", "text", "--seq-len", "10"], "leave out --data and --seq-len"),
    ],
)
def test_mistakes_of_streams_are_one_line(export, arguments, message, capsys):
    assert app.main(["eval", export, *arguments]) == 2
    assert message in capsys.readouterr().err
