"""LongViT (Wang et al. 2023, arXiv 2312.03558): a LongNet over the patches of one large image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.encoder import LongNetEncoder
from longnet_dist.models.torchscale import load_all, read_config, read_weights_file, rename_weights

RATES = (1, 2, 4, 8, 16)
SEGMENTS = {
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}
"""The published segment lengths by the side of images in pixels; for other sides they are `_SHORT`."""
_SHORT = (64, 128, 256, 512, 1024)
_ENTRIES = ("teacher", "module", "model")
_PREFIXES = ("module.", "backbone.", "model.")


class LongViT(nn.Module):
    """LongViT: an image, cut to patches, to one vector; the mean over patches of a bidirectional LongNet.

    Args:
        image_size: the side of the images for which branches are chosen, in pixels.
        patch_size: the side of a patch, in pixels.
        d_model, num_layers, num_heads: E, and the numbers of blocks and heads.
        ffn_dim: the hidden width of the feed-forward networks; 4 * d_model by default.
        table_size: the side of the table of learned positions, in patches; by default that of the images. For other
            images it is interpolated.
        num_classes: the number of classes of a fine-tuned model; 0 for features. None for a model that is not
            fine-tuned, in which the mean is taken after the norm.
        encoder_norm: whether the encoder has a final norm of its own, as in newer versions of torchscale it has not.
        padding: "torchscale" for the results that published weights were trained for, "none" for exact attention.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> model = LongViT(128, d_model=32, num_layers=1, num_heads=4).eval()
        >>> model(torch.randn(1, 3, 128, 128)).shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        image_size: int = 1024,
        patch_size: int = 32,
        d_model: int = 384,
        num_layers: int = 12,
        num_heads: int = 16,
        *,
        ffn_dim: int | None = None,
        table_size: int | None = None,
        num_classes: int | None = None,
        encoder_norm: bool = False,
        padding: Literal["torchscale", "none"] = "torchscale",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= patch_size <= image_size:
            raise ValueError(f"image_size is {image_size} and patch_size {patch_size}; an image needs a patch or more")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        config = LongNetConfig(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            segment_lengths=SEGMENTS.get(image_size, _SHORT),
            dilation_rates=RATES,
            head_phases="blocked",
            padding=padding,
            position="none",
        )
        self.patch_size = patch_size
        self.encoder = LongNetEncoder(config, input_dim=3 * patch_size**2, final_norm=encoder_norm, **factory)
        self.table_size = table_size or image_size // patch_size
        self.pos_embed = nn.Parameter(torch.empty(self.table_size**2, d_model, **factory))
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.02, b=0.02)
        fine_tuned = num_classes is not None
        self.norm = nn.Identity() if fine_tuned else nn.LayerNorm(d_model, eps=1e-6, **factory)
        self.fc_norm = nn.LayerNorm(d_model, **factory) if fine_tuned else nn.Identity()
        self.head = nn.Linear(d_model, num_classes, **factory) if num_classes else nn.Identity()

    def forward(self, images: Tensor, mesh: SequenceMesh | None = None) -> Tensor:
        """Compute the features of images, or the logits of classes.

        Args:
            images: (B, 3, height, width) in pixels; what is left beside whole patches is ignored.
            mesh: the ranks that share the patches of each image, of the pattern of `encoder.config` and as many rows as
                there are patches. All pass whole images, and the call is collective.

        Returns:
            (B, d_model or classes), the same on every rank.

        Raises:
            ValueError: if the images have another shape, or the mesh another number of rows.
        """
        height, width = (side // self.patch_size for side in images.shape[-2:]) if images.dim() == 4 else (0, 0)
        if not height * width or images.shape[1] != 3:
            refuse(
                f"images is {tuple(images.shape)}; it must be (B, 3, height, width), of one patch or more of "
                f"{self.patch_size} x {self.patch_size} pixels",
                mesh,
            )
        if mesh is not None and mesh.seq_len != height * width:
            refuse(f"the mesh is for {mesh.seq_len} rows, and the image has {height * width} patches", mesh)
        start, stop = (0, height * width) if mesh is None else (mesh.shard.start, mesh.shard.stop)
        x = image_patches(images, self.patch_size, start, stop)
        positions = self._positions(height, width, images.shape[-2:])[start:stop]
        x = self.norm(self.encoder(x, mesh, positions=positions[None]))
        return self.head(self.fc_norm(self.encoder.pool(x, "mean", mesh)))

    def _positions(self, height: int, width: int, sides: torch.Size) -> Tensor:
        """Interpolate the learned positions to a grid, as published: (height * width, E)."""
        n = self.table_size
        if height * width == n * n and sides[0] == sides[1]:
            return self.pos_embed
        grid = self.pos_embed.T.reshape(1, -1, n, n)
        # The published code adds 0.1, so that rounding removes no row; the factors decide where it interpolates.
        scale = ((height + 0.1) / math.sqrt(n * n), (width + 0.1) / math.sqrt(n * n))
        grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return grid.flatten(2)[0].T

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        *,
        image_size: int = 1024,
        num_heads: int = 16,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> LongViT:
        """Load published or fine-tuned weights, in eval mode; the sizes are those of the weights.

        The file is read in a way in which it cannot run code. Of DINO's weights, those of the teacher are read, without
        its head.

        Args:
            source: the file, of torchscale's LongViT.
            image_size: the side of the images, which decides the branches.
            num_heads: H; the weights do not say it.
            device: device of the parameters; the CPU by default.
            options: `padding` of the constructor.

        Raises:
            ValueError: if the file is no file of weights, or weights are missing, unexpected or of a wrong shape.
            FileNotFoundError: if the file is missing.
        """
        weights = {_without_prefixes(name): x for name, x in read_weights_file(Path(source), _ENTRIES).items()}
        patch, table = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
        if patch is None or patch.dim() != 4 or table is None or math.isqrt(table.shape[-2]) ** 2 != table.shape[-2]:
            raise ValueError(f"{source} has no patch_embed.proj.weight and pos_embed of a square: it is no LongViT")
        fine_tuned = "fc_norm.weight" in weights
        if not fine_tuned:  # DINO's projection, which only its training needs.
            weights = {name: x for name, x in weights.items() if not name.startswith("head.")}
        layers = {name.removeprefix("encoder."): x for name, x in weights.items() if name.startswith("encoder.")}
        sizes = read_config(layers, num_heads, (1024,), (1,), "none")
        head = weights.get("head.weight")
        model = cls(
            image_size,
            patch.shape[-1],
            sizes.d_model,
            sizes.num_layers,
            num_heads,
            ffn_dim=sizes.ffn_dim,
            table_size=math.isqrt(table.shape[-2]),
            num_classes=None if not fine_tuned else 0 if head is None else len(head),
            encoder_norm="layer_norm.weight" in layers,
            device=device,
            dtype=patch.dtype,
            **options,
        )
        ours = {f"encoder.{name}": x for name, x in rename_weights(layers, sizes, False).items()}
        ours |= {name: x for name, x in weights.items() if not name.startswith(("encoder.", "patch_embed."))}
        ours |= {"pos_embed": table.flatten(0, -2), "encoder.embedding.weight": patch.flatten(1)}
        ours |= (
            {"encoder.embedding.bias": weights["patch_embed.proj.bias"]} if "patch_embed.proj.bias" in weights else {}
        )
        load_all(model, ours, f"LongViT ({source})")
        return model.eval()


def image_patches(images: Tensor, patch_size: int, start: int, stop: int) -> Tensor:
    """Cut images to patches, row by row, and return those numbered [start, stop): (B, stop - start, C P P).

    Args:
        images: (B, C, height, width).
        patch_size: P, in pixels; what is left beside whole patches is ignored.
        start, stop: the patches to return; only rows of the image that hold them are copied.
    """
    P = patch_size
    width = images.shape[-1] // P
    first, last = start // width, -(-stop // width)
    rows = images[:, :, first * P : last * P, : width * P]
    patches = rows.unflatten(3, (width, P)).unflatten(2, (-1, P)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)[:, start - first * width : stop - first * width]


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
