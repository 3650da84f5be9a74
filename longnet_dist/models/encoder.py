"""LongNetEncoder: a bidirectional encoder of tokens or feature vectors, on one device or sequence-parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from longnet_dist.attention.documents import to_offsets
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.blocks import build_blocks, run_blocks
from longnet_dist.models.config import LongNetConfig, read_exported_config
from longnet_dist.models.loss import linear_token_loss
from longnet_dist.models.pretrained import copy_weights, read_weights, save_model
from longnet_dist.nn.block import Block
from longnet_dist.nn.multiway import Multiway, apply_to_rows, kinds_by_id

Pooling = Literal["class", "mean"] | None


class LongNetEncoder(nn.Module):
    """Bidirectional encoder with dilated attention (LongNet), pre-norm and sub-LayerNorm (Magneto).

    Args:
        config: the architecture. `vocab_size` and `tie_embeddings` do not count if there is an `input_dim`.
        input_dim: the width of inputs that are feature vectors, which a linear layer projects; None for token ids.
        class_token: whether a learned token stands before the inputs. It is row 0 of N + 1.
        final_norm: whether a LayerNorm follows the last block.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> config = LongNetConfig(d_model=32, num_layers=1, segment_lengths=(8, 32), dilation_rates=(1, 4))
        >>> encoder = LongNetEncoder(config, input_dim=12, class_token=True)
        >>> encoder(torch.randn(2, 100, 12), pooling="class").shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        input_dim: int | None = None,
        class_token: bool = False,
        final_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if input_dim is not None and input_dim < 1:
            raise ValueError(f"input_dim is {input_dim}; it must be the width of the inputs, or None for token ids")
        self.config, self.input_dim = config, input_dim
        self.tokenizer_file: Path | None = None
        """The file of the tokenizer that the model was trained with, as `from_pretrained` found it."""
        E = config.d_model
        self.embedding: nn.Module = (
            nn.Embedding(config.vocab_size, E, device=device, dtype=dtype)
            if input_dim is None
            else nn.Linear(input_dim, E, device=device, dtype=dtype)
        )
        self.class_token = nn.Parameter(torch.empty(E, device=device, dtype=dtype)) if class_token else None
        self.blocks = build_blocks(config, causal=False, device=device, dtype=dtype)
        self.norm: nn.Module = nn.LayerNorm(E, device=device, dtype=dtype) if final_norm else nn.Identity()
        if config.multiway and final_norm:
            self.norm = Multiway(self.norm)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters as Magneto does."""
        if isinstance(self.embedding, nn.Linear):
            nn.init.xavier_uniform_(self.embedding.weight)
            nn.init.zeros_(self.embedding.bias)
        elif isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters(self.config.num_layers)

    def forward(
        self,
        inputs: Tensor,
        mesh: SequenceMesh | None = None,
        lengths: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        pooling: Pooling = None,
        observe: Callable[[Tensor], None] | None = None,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Compute the features of each row after the final norm, pool them, or compute a loss.

        Args:
            inputs: token ids, (B, N), or with `input_dim` feature vectors, (B, N, input_dim). With a mesh, this rank's
                rows: `encoder.split(inputs, mesh)`.
            mesh: the ranks that hold the sequence of N rows, or of N + 1 with a class token; then the call is
                collective over the mesh's group.
            lengths: (B,), the number of inputs of each sequence, without the class token; those after it are padding.
            positions: position embeddings that are added to the embedded inputs, of shape (B or 1, N, d_model). With a
                mesh, this rank's, as `inputs`.
            token_types: (B, N), bool: true for inputs of the second kind, if the encoder is multiway; by default token
                ids from `multiway_first_id` on. The class token is of the first kind. With a mesh, this rank's, as
                `inputs`.
            pooling: "class" for the features of the class token, "mean" for the mean over the inputs that are not
                padding (0 if there is none), None for the features of each row, the class token's first.
            observe: a function that is called with the embedded inputs and the output of each block, before the final
                norm: num_layers + 1 tensors, each (B, rows, d_model).
            targets: (B, N), the ids to predict from token ids, -100 for none: see `mask_tokens`. With a mesh, this
                rank's, as `inputs`.
            cu_seqlens: the documents in each sequence; see `dilated_attention`. Not together with a class token.

        Returns:
            (B, d_model) with pooling, the same on every rank; without, (B, rows, d_model), one row for each of the
            sequence, or of this rank's part. With targets, the mean loss over the targets of all ranks, in nats; logits
            are products with the embedding's weight.

        Raises:
            ValueError: if a shape is wrong, the mesh has another pattern or length, or there is no class token to pool.
        """
        self._check_pooling(pooling, mesh)
        if targets is not None and (pooling is not None or self.input_dim is not None or self.class_token is not None):
            refuse("targets are for an encoder of token ids without class token and pooling", mesh)
        if cu_seqlens is not None and self.class_token is not None:
            refuse("cu_seqlens is for an encoder without class token, which belongs to no document", mesh)
        x = self._embed(inputs, mesh, positions)
        if self.input_dim is None:
            token_types = kinds_by_id(inputs, self.config.multiway_first_id, token_types)
        if observe is not None:
            observe(x)
        num_rows = lengths
        if lengths is not None and self.class_token is not None:
            to_offsets(None, lengths, len(x), (x.shape[1] if mesh is None else mesh.seq_len) - 1, mesh)  # Checks them.
            num_rows = lengths + 1
        if token_types is not None and self._holds_class_token(mesh):
            token_types = nn.functional.pad(token_types, (1, 0))
        x = run_blocks(
            self.blocks, x, self.config, mesh, cu_seqlens, num_rows, token_types=token_types, observe=observe
        )
        x = apply_to_rows(self.norm, x, token_types)
        if targets is not None:
            assert isinstance(self.embedding, nn.Embedding)
            return linear_token_loss(x, self.embedding.weight, targets, mesh)
        return x if pooling is None else self.pool(x, pooling, mesh, lengths)

    def hidden_states(
        self,
        inputs: Tensor,
        mesh: SequenceMesh | None = None,
        lengths: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> list[Tensor]:
        """Compute the embedded inputs and the output of every block, before the final norm.

        Args:
            inputs, mesh, lengths, positions, token_types: see `forward`.

        Returns:
            num_layers + 1 tensors, each (B, rows, d_model).

        Raises:
            ValueError: as `forward` does.
        """
        states: list[Tensor] = []
        self(inputs, mesh, lengths, positions=positions, token_types=token_types, observe=states.append)
        return states

    def pool(
        self,
        features: Tensor,
        pooling: Literal["class", "mean"],
        mesh: SequenceMesh | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Pool the features of rows to one vector per sequence.

        With a mesh every rank gets the result, and the gradient of each rank is that of its own rows, as that of
        `SequenceMesh.sum`.

        Args:
            features: (B, rows, d_model), as `forward` and `hidden_states` return them.
            pooling: see `forward`.
            mesh: the ranks that hold the sequence; the call is then collective.
            lengths: see `forward`.

        Returns:
            (B, d_model).

        Raises:
            ValueError: if there is no class token to pool, or `pooling` is unknown.
        """
        self._check_pooling(pooling, mesh)
        first = 0 if mesh is None else mesh.shard.start
        num_rows = features.shape[1] if mesh is None else mesh.seq_len
        rows = torch.arange(first, first + features.shape[1], device=features.device)
        num_class = int(self.class_token is not None)
        if pooling == "class":
            selected = (rows == 0)[None]
            count = torch.ones((), device=features.device)
        else:
            real = torch.full((len(features),), num_rows - num_class) if lengths is None else lengths
            count = real.to(features.device).clamp(min=1)[:, None]
            selected = (rows >= num_class) & (rows < real.to(features.device)[:, None] + num_class)
        # In at least float32: a long sequence has too many rows for a sum in bfloat16.
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        total = torch.where(selected[..., None], wide, 0).sum(1)
        return ((total if mesh is None else mesh.sum(total)) / count).to(features.dtype)

    def split(self, inputs: Tensor, mesh: SequenceMesh) -> Tensor:
        """Take this rank's part of inputs that every rank holds whole.

        Args:
            inputs: (B, N) or (B, N, ...).
            mesh: the ranks that hold the sequence of N rows, or of N + 1 with a class token, which rank 0 holds.

        Raises:
            ValueError: if the mesh is for another number of rows.
        """
        num_class = int(self.class_token is not None)
        if inputs.shape[1] + num_class != mesh.seq_len:
            raise ValueError(
                f"the mesh is for {mesh.seq_len} rows, and {inputs.shape[1]} inputs have {inputs.shape[1] + num_class}"
                + (": the class token is one" if num_class else "")
            )
        return inputs[:, max(0, mesh.shard.start - num_class) : max(0, mesh.shard.stop - num_class)]

    def save_pretrained(self, folder: Path | str, tokenizer: Path | str | None = None) -> None:
        """Write `config.json`, `model.safetensors` and the tokenizer's file into `folder`, for `from_pretrained`.

        Args:
            folder: the folder to write into; created if it is missing.
            tokenizer: the tokenizer's file; by default `tokenizer_file`. Without one, tokens are bytes.

        Raises:
            ValueError: if the encoder is not as `train` builds it, with this class's defaults.
        """
        expected = LongNetEncoder(self.config, device="meta").state_dict().keys()
        if expected != self.state_dict().keys() or self.input_dim is not None:
            raise ValueError("only an encoder of token ids without class token can be saved so")
        save_model(self, self.config, folder, tokenizer or self.tokenizer_file, "mlm")

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: torch.device | str | None = None) -> LongNetEncoder:
        """Load an encoder that `save_pretrained` or `longnet-dist export` wrote, in the file's dtype, in eval mode.

        Args:
            folder: the folder with `config.json` and `model.safetensors`.
            device: device of the parameters; the CPU by default.

        Raises:
            ValueError: if the tensors are not those of the configuration, or the folder is that of a decoder or a run.
            FileNotFoundError: if a file is missing.
        """
        folder = Path(folder)
        config, tokenizer_file = read_exported_config(folder, "mlm")
        tensors = read_weights(folder)
        encoder = cls(config, device=device, dtype=next(iter(tensors.values())).dtype)
        copy_weights(encoder, tensors, folder)
        encoder.tokenizer_file = tokenizer_file
        return encoder.eval()

    def _embed(self, inputs: Tensor, mesh: SequenceMesh | None, positions: Tensor | None) -> Tensor:
        if self.input_dim is None and (inputs.dim() != 2 or inputs.is_floating_point()):
            refuse(f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; they must be token ids, (B, N)", mesh)
        if self.input_dim is not None and (inputs.dim() != 3 or inputs.shape[-1] != self.input_dim):
            refuse(f"inputs is {tuple(inputs.shape)}; it must be (B, N, input_dim) = (B, N, {self.input_dim})", mesh)
        x = self.embedding(inputs)
        if self.input_dim is None:
            x = x * self.config.d_model**0.5
        if positions is not None:
            if positions.dim() != 3 or positions.shape[1:] != x.shape[1:] or positions.shape[0] not in (1, len(x)):
                refuse(f"positions is {tuple(positions.shape)}; it must be (B or 1, N, E) of {tuple(x.shape)}", mesh)
            x = x + positions.to(x.dtype)
        if self.class_token is not None and self._holds_class_token(mesh):
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        if mesh is not None and x.shape[1] != mesh.shard.num_rows:
            refuse(mesh.wrong_rows("the input", x.shape[1]) + "; see LongNetEncoder.split", mesh)
        return x

    def _holds_class_token(self, mesh: SequenceMesh | None) -> bool:
        return self.class_token is not None and (mesh is None or mesh.shard.start == 0 < mesh.shard.num_rows)

    def _check_pooling(self, pooling: Pooling, mesh: SequenceMesh | None) -> None:
        if pooling not in ("class", "mean", None):
            refuse(f"pooling is {pooling!r}; it must be 'class', 'mean' or None", mesh)
        if pooling == "class" and self.class_token is None:
            refuse("pooling is 'class', and this encoder has no class token; use 'mean', or class_token=True", mesh)
