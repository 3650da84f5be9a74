"""A failure here means: a slide's embedding depends on the number of ranks, or a bad file stops the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from longnet_dist import SequenceMesh
from longnet_dist.inference.slides import embed_slides
from longnet_dist.models.longvit import LongViT
from longnet_dist.models.slide_encoder import SlideEncoder


def build(dtype=torch.float64, **options):
    torch.manual_seed(3)
    # Segments of 1024 to 4096 rows: those of up to 64 x 64 tiles.
    return SlideEncoder(12, 32, 2, 4, slide_size=64 * 256, dtype=dtype, **options).eval()


def tiles(num_tiles, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(2, num_tiles, 12, dtype=dtype, generator=generator)
    return features, 256 * torch.randint(64, (2, num_tiles, 2), generator=generator)


def embed_over_ranks(group, num_tiles, lengths):
    for padding, dtype, tolerance in (
        ("torchscale", torch.float64, 1e-12),
        ("none", torch.float64, 1e-12),
        ("torchscale", torch.float32, 1e-5),
    ):
        for global_pool in (False, True):
            model = build(dtype, padding=padding, global_pool=global_pool)
            whole = tiles(num_tiles, dtype)
            mesh = model.make_mesh(group, num_tiles)
            part = [model.encoder.split(x, mesh) for x in whole]
            with torch.no_grad():
                expected = model(*whole, lengths=lengths)
                assert_close(model(*part, lengths=lengths, mesh=mesh), expected, rtol=0, atol=tolerance)
                embedding, layers = model.with_layers(*part, lengths=lengths, mesh=mesh)
                assert_close(embedding, expected, rtol=0, atol=tolerance)
                expected_layers = model(*whole, all_layers=True, lengths=lengths)
                assert_close(layers, expected_layers, rtol=0, atol=tolerance)
    assert sum(x.shape[1] for x in part[:1]) < num_tiles  # A rank holds its own rows alone.
    if num_tiles > 2:
        bad = -part[1] - 1 if mesh.rank == 0 else part[1]
        with pytest.raises(ValueError, match="coords has a value that is negative"):
            model(part[0], bad, mesh=mesh)


@pytest.mark.parametrize(("world", "num_tiles", "lengths"), [(2, 1300, None), (2, 40, [40, 7]), (4, 2, None)])
def test_a_slide_over_ranks(pool, world, num_tiles, lengths):
    """The sequence of a class token and tiles is ragged, and also shorter than the ranks are many."""
    pool.run(world, embed_over_ranks, num_tiles, None if lengths is None else torch.tensor(lengths))


def embed_files_over_ranks(group, folder):
    files = sorted(folder.glob("*.*"))
    failed = embed_slides(build(), files, folder / "out", all_layers=True, group=group)
    dist.barrier(group)
    return [path.name for path in failed]


def test_files_over_ranks(pool, tmp_path):
    """The first rank writes; a file that cannot be read fails on every rank, and the next is embedded."""
    features, coords = (x[0] for x in tiles(30))
    np.savez(tmp_path / "a.npz", features=features, coords=coords)
    (tmp_path / "b.npz").write_bytes(b"PK broken")
    np.savez(tmp_path / "c.npz", features=features[:9], coords=coords[:9])
    assert pool.run(2, embed_files_over_ranks, tmp_path) == [["b.npz"], ["b.npz"]]
    model = build()
    for name, count in (("a", 30), ("c", 9)):
        written = np.load(tmp_path / "out" / f"{name}.npz")
        with torch.no_grad():
            embedding, layers = model.with_layers(features[None, :count].float().double(), coords[None, :count])
        assert_close(written["embedding"], embedding[0].float().numpy())
        assert_close(written["layers"], torch.cat(layers).float().numpy())


def image_over_ranks(group):
    torch.manual_seed(3)
    model = LongViT(96, 8, 32, 2, 4, dtype=torch.float64).eval()
    images = torch.randn(2, 3, 88, 96, dtype=torch.float64)
    mesh = SequenceMesh(group, model.encoder.config.pattern, 11 * 12)
    with torch.no_grad():
        assert_close(model(images, mesh), model(images), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the mesh is for 132 rows, and the image has 121 patches"):
        model(images[..., :88], mesh)


def test_an_image_over_ranks(pool):
    pool.run(2, image_over_ranks)
