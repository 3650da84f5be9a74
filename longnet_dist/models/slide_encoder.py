"""The slide encoder of Prov-GigaPath (Xu et al., Nature 2024): a LongNet over the tiles of a whole-slide image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.extras import extra
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.encoder import LongNetEncoder
from longnet_dist.models.torchscale import load_all, read_config, read_weights_file, rename_weights

RATES = (1, 2, 4, 8, 16)
_FILE = "slide_encoder.pth"
_NUM_HEADS = 16
_HUB = "hf_hub:"


class SlideEncoder(nn.Module):
    """Prov-GigaPath's slide encoder: tile features and their places to one vector for each slide.

    Args:
        input_dim: the width of a tile's features.
        d_model, num_layers, num_heads: E, and the numbers of blocks and heads.
        ffn_dim: the hidden width of the feed-forward networks; 4 * d_model by default.
        slide_size: the largest side of a slide, in pixels; with `tile_size` it decides the segment lengths.
        tile_size: the side of a tile, in pixels.
        global_pool: whether to pool by the mean over tiles, instead of the class token.
        padding: "torchscale" for the results that the published weights were trained for, "none" for exact attention.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> encoder = SlideEncoder(d_model=64, num_layers=1).eval()
        >>> encoder(torch.randn(1, 10, 1536), 256 * torch.randint(1000, (1, 10, 2))).shape
        torch.Size([1, 64])
    """

    def __init__(
        self,
        input_dim: int = 1536,
        d_model: int = 768,
        num_layers: int = 12,
        num_heads: int = _NUM_HEADS,
        *,
        ffn_dim: int | None = None,
        slide_size: int = 262144,
        tile_size: int = 256,
        global_pool: bool = False,
        padding: Literal["torchscale", "none"] = "torchscale",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model % 4:
            raise ValueError(f"d_model is {d_model}; two-dimensional sines and cosines need a multiple of 4")
        config = LongNetConfig(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            segment_lengths=segment_lengths(slide_size, tile_size),
            dilation_rates=RATES,
            head_phases="blocked",
            padding=padding,
            position="none",
        )
        self.tile_size, self.global_pool = tile_size, global_pool
        self.encoder = LongNetEncoder(config, input_dim=input_dim, class_token=True, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(d_model, eps=1e-6, device=device, dtype=dtype)

    @overload
    def forward(
        self,
        features: Tensor,
        coords: Tensor,
        all_layers: Literal[False] = False,
        lengths: Tensor | None = None,
        mesh: SequenceMesh | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        features: Tensor,
        coords: Tensor,
        all_layers: Literal[True],
        lengths: Tensor | None = None,
        mesh: SequenceMesh | None = None,
    ) -> list[Tensor]: ...

    def forward(
        self,
        features: Tensor,
        coords: Tensor,
        all_layers: bool = False,
        lengths: Tensor | None = None,
        mesh: SequenceMesh | None = None,
    ) -> Tensor | list[Tensor]:
        """Embed slides.

        Args:
            features: (B, N, input_dim), the features of each slide's tiles.
            coords: (B, N, 2), the x and y of each tile's corner, in pixels of the level that was tiled.
            all_layers: whether to return the embeddings of all layers.
            lengths: (B,), the number of tiles of each slide, if slides are padded to N.
            mesh: the ranks that share the slides, made by `make_mesh`; `features` and `coords` are then this rank's
                part, `encoder.split(features, mesh)`. The call is collective.

        Returns:
            (B, d_model), the same on every rank. With `all_layers`, num_layers + 1 of them: after the embedding of
            tiles, and after each block. As in the published code, these skip the encoder's own final norm, so that
            the last is not the result without `all_layers`.

        Raises:
            ValueError: if a shape is wrong, or a coordinate is negative or not finite.
        """
        if not all_layers:
            return self._embed(features, coords, lengths, mesh, None)
        layers: list[Tensor] = []
        self._embed(features, coords, lengths, mesh, layers)
        return layers

    def with_layers(
        self, features: Tensor, coords: Tensor, lengths: Tensor | None = None, mesh: SequenceMesh | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embed slides in one run: the result without `all_layers`, and that with it.

        Args:
            features, coords, lengths, mesh: see `forward`.
        """
        layers: list[Tensor] = []
        return self._embed(features, coords, lengths, mesh, layers), layers

    def make_mesh(self, group: ProcessGroup | None, num_tiles: int, **options: Any) -> SequenceMesh:
        """Make the mesh of ranks that share slides of this many tiles; a slide has a row more, its class token.

        Args:
            group: the ranks.
            num_tiles: N.
            options: those of `SequenceMesh`.
        """
        return SequenceMesh(group, self.encoder.config.pattern, num_tiles + 1, **options)

    def _embed(
        self,
        features: Tensor,
        coords: Tensor,
        lengths: Tensor | None,
        mesh: SequenceMesh | None,
        layers: list[Tensor] | None,
    ) -> Tensor:
        """Return the embeddings of slides; those of all layers go into `layers`, if it is a list."""
        if features.dim() != 3 or coords.shape != (*features.shape[:2], 2):
            refuse(
                f"features is {tuple(features.shape)} and coords {tuple(coords.shape)}; they must be (B, N, "
                f"{self.encoder.input_dim}) and (B, N, 2)",
                mesh,
            )
        if not are_places(coords):
            refuse("coords has a value that is negative or not finite; they are pixels from the slide's corner", mesh)
        positions = grid_embeddings(coords, self.encoder.config.d_model, self.tile_size)
        positions = positions.to(features.device, self.norm.weight.dtype)
        pooling: Literal["mean", "class"] = "mean" if self.global_pool else "class"

        def observe(x: Tensor) -> None:
            assert layers is not None
            layers.append(self.norm(self.encoder.pool(x, pooling, mesh, lengths)))

        options: dict[str, Any] = {"positions": positions, "observe": None if layers is None else observe}
        # LayerNorm acts on each row, so the norm of the class token's row is that row of the norm.
        return self.norm(self.encoder(features, mesh, lengths, pooling=pooling, **options))

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        *,
        num_heads: int = _NUM_HEADS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> SlideEncoder:
        """Load published weights, in eval mode; the sizes are those of the weights.

        The file is read with `weights_only=True`, so that it cannot run code.

        Args:
            source: the file `slide_encoder.pth`, or `hf_hub:OWNER/NAME` for the repository of the Hugging Face hub
                that holds it. That needs the package huggingface_hub, and access that the owner grants.
            num_heads: H; the weights do not say it.
            device: device of the parameters; the CPU by default.
            dtype: dtype of the parameters, in which the model computes; by default that of the weights.
            options: `slide_size`, `tile_size`, `global_pool` and `padding` of the constructor.

        Raises:
            ValueError: if the file is no file of weights, or weights are missing, unexpected or of a wrong shape.
            FileNotFoundError: if the file is missing.
        """
        path = Path(source)
        if str(source).startswith(_HUB):
            with extra("hf", source):
                from huggingface_hub import hf_hub_download
            path = Path(hf_hub_download(str(source).removeprefix(_HUB), _FILE))
        weights = read_weights_file(path)
        patch = weights.get("patch_embed.proj.weight")
        if patch is None or patch.dim() != 2:
            raise ValueError(f"{path} has no patch_embed.proj.weight, (d_model, input_dim): it is no slide encoder")
        layers = {name.removeprefix("encoder."): x for name, x in weights.items() if name.startswith("encoder.")}
        sizes = read_config(layers, num_heads, (1024,), (1,), "none")
        model = cls(
            patch.shape[1],
            sizes.d_model,
            sizes.num_layers,
            num_heads,
            ffn_dim=sizes.ffn_dim,
            device=device,
            dtype=dtype or patch.dtype,
            **options,
        )
        load_all(model, _by_our_names(weights, layers, sizes), f"the slide encoder ({path})")
        return model.eval()


def segment_lengths(slide_size: int, tile_size: int) -> tuple[int, ...]:
    """Return the segment lengths of a slide encoder: five powers of 2 from 1024 to the number of tiles.

    Args:
        slide_size, tile_size: sides of the largest slide and of a tile, in pixels.

    Raises:
        ValueError: if the slide has fewer than 16 tiles, the largest rate.

    Example:
        >>> segment_lengths(262144, 256)
        (1024, 5792, 32768, 185363, 1048576)
    """
    num_tiles = (slide_size // tile_size) ** 2 if tile_size > 0 else 0
    if num_tiles < max(RATES):
        raise ValueError(f"a slide of {slide_size} pixels has {num_tiles} tiles of {tile_size}; it needs 16 or more")
    last = int(math.log2(num_tiles))
    return tuple(int(2 ** (10 + (last - 10) * i / 4)) for i in range(5))


def grid_embeddings(coords: Tensor, d_model: int, tile_size: int) -> Tensor:
    """Compute fixed sine-cosine embeddings of tiles' places in the grid, for these tiles alone.

    Args:
        coords: (..., 2), x and y in pixels.
        d_model: E, a multiple of 4: half for the row y, half for the column x, each first sines and then cosines.
        tile_size: the side of a tile, in pixels.

    Returns:
        (..., E), float64.

    Raises:
        ValueError: if a coordinate is negative or not finite.
    """
    if not are_places(coords):
        raise ValueError("coords has a value that is negative or not finite; they are pixels from the slide's corner")
    cells = (coords.double() / tile_size).floor()
    rates = 10000.0 ** -(torch.arange(d_model // 4, dtype=torch.float64, device=coords.device) / (d_model // 4))
    angles = cells.flip(-1)[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def are_places(coords: Tensor) -> bool:
    """Return whether no coordinate is negative or not finite."""
    return bool((coords >= 0).all() & coords.isfinite().all())


def _by_our_names(weights: dict[str, Tensor], layers: dict[str, Tensor], config: LongNetConfig) -> dict[str, Tensor]:
    result = {f"encoder.{name}": x for name, x in rename_weights(layers, config, False).items()}
    for name, x in weights.items():
        if name == "cls_token":
            result["encoder.class_token"] = x.reshape(-1)
        elif name.startswith("patch_embed.proj."):
            result[name.replace("patch_embed.proj", "encoder.embedding")] = x
        elif name != "pos_embed" and not name.startswith("encoder."):  # pos_embed is fixed; it is computed here.
            result[name] = x
    return result
