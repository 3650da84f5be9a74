"""Embed whole slides with Prov-GigaPath's slide encoder, here a small one with random weights.

python examples/slides.py                                  # slides of random numbers
python examples/slides.py --weights slide_encoder.pth --tiles tiles/
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from longnet_dist.inference.slides import embed_slides, find_tile_files
from longnet_dist.models.slide_encoder import SlideEncoder


def write_random_slides(folder: Path, input_dim: int = 1536) -> None:
    """Write three slides, as tile encoders do: features of tiles, and their places in pixels."""
    numbers = np.random.default_rng(0)
    for number, num_tiles in enumerate((50, 400, 1100)):
        features = numbers.standard_normal((num_tiles, input_dim), dtype=np.float32)
        coords = 256 * numbers.integers(0, 200, (num_tiles, 2))
        np.savez(folder / f"slide-{number}.npz", features=features, coords=coords)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="slide_encoder.pth")
    parser.add_argument("--tiles", type=Path, help="folder of .h5, .npz or .pt files")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.weights:
        model = SlideEncoder.from_pretrained(options.weights)
    else:
        model = SlideEncoder(d_model=96, num_layers=2).eval()
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiles is None:
            write_random_slides(Path(scratch))
        out = Path(scratch) / "embeddings"
        failed = embed_slides(model, find_tile_files([options.tiles or Path(scratch)]), out)
        vectors = {path.stem: np.load(path)["embedding"] for path in sorted(out.glob("*.npz"))}
    for name, vector in vectors.items():
        print(f"{name}: {len(vector)} numbers, norm {np.linalg.norm(vector):.3f}")
    if failed:
        raise SystemExit(f"{len(failed)} slides failed")


if __name__ == "__main__":
    main()
