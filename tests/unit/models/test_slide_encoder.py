"""A failure here means: a slide gets another embedding than Prov-GigaPath's, or a bad file ends the work on others."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from longnet_dist.cli.app import main
from longnet_dist.inference.slides import read_tiles
from longnet_dist.models.slide_encoder import SlideEncoder, grid_embeddings, segment_lengths
from tests.unit.models.test_torchscale import published_blocks, weights_of_torchscale

BRANCHES = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))


def published_weights(E=32, input_dim=12):
    weights = {f"encoder.{name}": x for name, x in weights_of_torchscale(E=E).items()}
    weights |= {"cls_token": torch.randn(1, 1, E), "patch_embed.proj.weight": torch.randn(E, input_dim)}
    weights |= {"patch_embed.proj.bias": torch.randn(E), "norm.weight": torch.randn(E), "norm.bias": torch.randn(E)}
    return {name: x.double() for name, x in weights.items()}


def published_position(x, y, E):
    """An entry of the published table, whose first half is y's."""
    result = []
    for place in (y, x):
        angles = [place / 10000 ** (i / (E // 4)) for i in range(E // 4)]
        result += [*map(math.sin, angles), *map(math.cos, angles)]
    return torch.tensor(result, dtype=torch.float64)


@pytest.fixture
def weights_file(tmp_path):
    torch.save({"model": published_weights()}, tmp_path / "slide_encoder.pth")
    return tmp_path / "slide_encoder.pth"


def test_segments_are_the_published_ones():
    assert segment_lengths(262144, 256) == BRANCHES[0]
    assert SlideEncoder(d_model=16, num_layers=1).encoder.config.pattern.segment_lengths == BRANCHES[0]
    with pytest.raises(ValueError, match="has 9 tiles of 256; it needs 16 or more"):
        segment_lengths(800, 256)


def test_positions_are_those_of_the_table():
    coords = torch.tensor([[0, 0], [256, 511], [999 * 256, 3 * 256 + 100]])
    expected = [published_position(x, y, 32) for x, y in ((0, 0), (1, 1), (999, 3))]
    assert_close(grid_embeddings(coords, 32, 256), torch.stack(expected), rtol=0, atol=1e-12)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="negative or not finite"):
            grid_embeddings(torch.tensor([[bad, 0.0]]), 32, 256)


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("num_tiles", [1, 37])
def test_embeddings_are_the_published_ones(weights_file, global_pool, num_tiles):
    weights = published_weights()
    torch.save({"model": weights}, weights_file)
    model = SlideEncoder.from_pretrained(weights_file, global_pool=global_pool)
    features = torch.randn(num_tiles, 12, dtype=torch.float64)
    cells = torch.randint(1000, (num_tiles, 2))
    table = torch.stack([published_position(x, y, 32) for x, y in cells.tolist()])
    tiles = features @ weights["patch_embed.proj.weight"].T + weights["patch_embed.proj.bias"] + table
    x = torch.cat([weights["cls_token"][0], tiles])
    layers = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}

    def pooled(x):
        x = x[1:].mean(0) if global_pool else x[0]
        return layer_norm(x, (32,), weights["norm.weight"], weights["norm.bias"], 1e-6)

    expected = pooled(published_blocks(x, layers, 2, 16, BRANCHES))
    actual = model(features[None], 256 * cells[None] + 17)
    assert_close(actual[0], expected, rtol=0, atol=1e-11)
    del layers["layer_norm.weight"]
    states = [pooled(published_blocks(x, layers, count, 16, BRANCHES)) for count in range(3)]
    assert_close([s[0] for s in model(features[None], 256 * cells[None], all_layers=True)], states, rtol=0, atol=1e-11)
    both = torch.cat([features[None], torch.randn(1, num_tiles, 12)]).double(), 256 * cells.expand(2, -1, -1)
    ragged = model(*both, lengths=torch.tensor([num_tiles, 0]))
    assert_close(ragged[0], expected, rtol=0, atol=1e-11)


def test_weights_that_do_not_fit_are_named(tmp_path):
    weights, file = published_weights(), tmp_path / "w.pth"
    weights["decoder.weight"] = weights.pop("norm.bias")
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"decoder\.weight is unexpected; norm\.bias is missing"):
        SlideEncoder.from_pretrained(file)
    torch.save([1], file)
    with pytest.raises(ValueError, match="has no weights by name"):
        SlideEncoder.from_pretrained(file)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is no file of weights alone"):
        SlideEncoder.from_pretrained(file)
    with pytest.raises(ValueError, match=r"they must be \(B, N, 1536\) and \(B, N, 2\)"):
        SlideEncoder(d_model=16, num_layers=1)(torch.zeros(1, 3, 1536), torch.zeros(1, 4, 2))


def test_a_bad_slide_is_named_and_the_others_are_embedded(tmp_path, weights_file, capsys):
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    features, coords = torch.randn(20, 12), 256 * torch.randint(100, (20, 2))
    np.savez(tiles / "a.npz", features=features.numpy(), coords=coords.numpy())
    torch.save({"tile_embeds": features[None], "coords": coords[None]}, tiles / "b.pt")
    (tiles / "c.npz").write_bytes(b"PK broken")
    torch.save({"features": features}, tiles / "d.pt")
    torch.save({"features": features[:, :5], "coords": coords}, tiles / "e.pt")
    (tiles / "notes.txt").write_text("no tiles")
    command = ["embed-slides", str(tiles), "--weights", str(weights_file), "--out", str(tmp_path / "out")]
    assert main([*command, "--all-layers"]) == 1
    printed = capsys.readouterr()
    assert "[1/5]" in printed.out
    assert "a.npz: 20 tiles" in printed.out
    assert "d.pt failed: it has features; it must have features and coords" in printed.err
    assert "e.pt failed: features have 5 values, and these weights need 12" in printed.err
    assert "longnet-dist: 3 of 5 slides failed" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npz", "b.npz"]
    a, b = (np.load(tmp_path / "out" / name) for name in ("a.npz", "b.npz"))
    model = SlideEncoder.from_pretrained(weights_file)
    expected = model(features[None].double(), coords[None])[0].float()
    assert_close(torch.from_numpy(a["embedding"]), expected.detach())
    assert_close(a["embedding"], b["embedding"])
    assert a["layers"].shape == (3, 32)
    assert main(["embed-slides", str(tiles / "a.npz"), *command[2:]]) == 0


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_slides_are_embedded_in_any_dtype(tmp_path, weights_file, dtype, error):
    """The weights are in float64, so float32 has an error, too."""
    features, coords = torch.randn(300, 12), 256 * torch.randint(100, (300, 2))
    np.savez(tmp_path / "a.npz", features=features.numpy(), coords=coords.numpy())
    command = ["embed-slides", str(tmp_path / "a.npz"), "--weights", str(weights_file), "--out"]
    for folder, options in (("exact", []), (dtype, ["--dtype", dtype])):
        assert main([*command, str(tmp_path / folder), *options]) == 0
    actual, exact = (np.load(tmp_path / folder / "a.npz")["embedding"] for folder in (dtype, "exact"))
    assert actual.dtype == np.float32
    assert 0 < np.abs(actual - exact).max() < error * np.abs(exact).max()


@pytest.mark.parametrize(
    ("tiles", "message"), [("nowhere", "nowhere does not exist"), (".", "there is no file that ends in .h5, .pt, .npz")]
)
def test_mistakes_of_the_command_exit_2(tiles, message, tmp_path, weights_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["embed-slides", tiles, "--weights", str(weights_file), "--out", "out"]) == 2
    assert message in capsys.readouterr().err


def test_an_h5_file_without_h5py(tmp_path, weights_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").touch()
    assert main(["embed-slides", str(tmp_path / "a.h5"), "--weights", str(weights_file), "--out", str(tmp_path)]) == 1
    assert "a.h5 needs the package h5py: pip install -e '.[slides]' in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_h5_files(tmp_path, order, dtype):
    """Of any byte order and precision, with other entries, compressed or not."""
    h5py = pytest.importorskip("h5py")
    features = np.random.default_rng(0).standard_normal((30, 12)).astype(order + dtype)
    coords = np.arange(60).reshape(30, 2).astype(order + "i4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=features, chunks=(7, 5), compression="gzip")
        file["coords"], file["other"] = coords, np.array([b"text"])
        file.attrs["patch_size"] = 256
    read_features, read_coords = read_tiles(tmp_path / "a.h5")
    assert read_features.dtype == torch.float32
    assert_close(read_features.numpy(), features.astype("f4"), rtol=0, atol=0)
    assert_close(read_coords.numpy(), coords.astype("i4"), rtol=0, atol=0)


def test_bad_h5_files_are_named_and_the_others_are_embedded(tmp_path, weights_file, capsys):
    h5py = pytest.importorskip("h5py")
    features, coords = np.ones((20, 12), np.float32), np.zeros((20, 2), np.int64)

    def write(name, **arrays):
        with h5py.File(tmp_path / name, "w") as file:
            for key, array in arrays.items():
                file[key] = array

    write("a.h5", features=features, coords=coords)
    (tmp_path / "b.h5").write_bytes(b"no HDF5")
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "c.h5").write_bytes(content[: len(content) // 2])
    write("d.h5", features=features)
    write("e.h5", features=features, coords=np.array([b"text"] * 20))
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_group("features")
    write("g.h5", features=features[None], coords=coords[None])
    out = tmp_path / "out"
    assert main(["embed-slides", str(tmp_path), "--weights", str(weights_file), "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    for name in "bcdef":
        assert f"{name}.h5 failed: " in errors
    assert "d.h5 failed: it has features; it must have features and coords" in errors
    assert "e.h5 failed: coords is no array of numbers" in errors
    a, g = (np.load(out / f"{name}.npz")["embedding"] for name in "ag")
    assert_close(a, g, rtol=0, atol=0)
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "g.npz"]


def test_the_example_runs(monkeypatch, capsys):
    script = Path(__file__).parents[3] / "examples" / "slides.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert "slide-2: 96 numbers, norm" in capsys.readouterr().out
