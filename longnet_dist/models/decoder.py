"""LongNet: a causal decoder language model, on one device or sequence-parallel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longnet_dist.attention.cache import DilatedCache
from longnet_dist.data.tokenizers import load_tokenizer
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.blocks import build_blocks, compute_dtype, run_blocks
from longnet_dist.models.config import LongNetConfig, read_exported_config
from longnet_dist.models.generation import Sampling, continue_sequences, stream_tokens
from longnet_dist.models.loss import check_targets, linear_token_loss, log_likelihoods, within_documents
from longnet_dist.models.pretrained import copy_weights, read_weights, save_model
from longnet_dist.nn.block import Block
from longnet_dist.nn.multiway import Multiway, apply_to_rows, kinds_by_id


class LongNet(nn.Module):
    """Causal decoder with dilated attention (LongNet, section 4.1), pre-norm and sub-LayerNorm (Magneto).

    Args:
        config: the architecture.
        device, dtype: device and dtype of the parameters.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> model = LongNetConfig(d_model=32, num_layers=1, segment_lengths=(8, 32), dilation_rates=(1, 4)).build()
        >>> model(torch.randint(257, (1, 100))).shape
        torch.Size([1, 100, 257])
    """

    def __init__(
        self, config: LongNetConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_file: Path | None = None
        """The file of the tokenizer that the model was trained with, as `from_pretrained` found it."""
        E = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, E, device=device, dtype=dtype)
        self.blocks = build_blocks(config, causal=True, device=device, dtype=dtype)
        norm = nn.LayerNorm(E, device=device, dtype=dtype)
        self.norm = Multiway(norm) if config.multiway else norm
        self.output = nn.Linear(E, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters as Magneto does; the first logits have a standard deviation of 1."""
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.output.weight, std=self.config.d_model**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters(self.config.num_layers)

    def forward(
        self,
        tokens: Tensor,
        mesh: SequenceMesh | None = None,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: Sequence[DilatedCache] | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits of the next token, or the loss if there are targets.

        Args:
            tokens: (B, N), int64; with a mesh (B, L), this rank's rows.
            mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
            targets: the token after each of `tokens`, of their shape: `next_token_labels(tokens)`, and with a mesh
                `mesh.split(next_token_labels(tokens))`. They are not shifted again.
            cu_seqlens, lengths: the documents in each sequence, or the number of its tokens; see `dilated_attention`.
                Positions begin anew with each document, and no token is predicted from another document or padding.
            cache: the past of the sequences, from `new_cache`, for inference: `tokens` come after it, and are added.
            token_types: (B, N or L), bool: true for tokens of the second kind, if the model is multiway; by default ids
                from `multiway_first_id` on.

        Returns:
            Logits, (B, N or L, vocab_size). With `targets`, the mean loss of `token_loss`; the logits then never exist
            as a whole.

        Raises:
            ValueError: if a shape is wrong, or the mesh has another pattern or length; if targets are not shifted, or
                ranks of a mesh have different sequences.
        """
        if targets is None:
            return self.output(self.features(tokens, mesh, cu_seqlens, lengths, cache, token_types))
        check_targets(tokens, targets, mesh)
        features = self.features(tokens, mesh, cu_seqlens, lengths, cache, token_types)
        if cu_seqlens is not None or lengths is not None:
            targets = within_documents(targets, mesh, cu_seqlens, lengths)
        return linear_token_loss(features, self.output.weight, targets, mesh)

    def features(
        self,
        tokens: Tensor,
        mesh: SequenceMesh | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: Sequence[DilatedCache] | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Compute the features that the output projection takes.

        Args:
            tokens: (B, N), int64; with a mesh (B, L), this rank's rows.
            mesh: the ranks that hold the sequence; the call is then collective over the mesh's group.
            cu_seqlens, lengths, cache, token_types: see `forward`.

        Returns:
            The features after the final norm, (B, N or L, d_model).

        Raises:
            ValueError: if a shape is wrong, or the mesh has another pattern or length.
        """
        if tokens.dim() != 2:
            refuse(f"tokens is {tuple(tokens.shape)}; it must be (B, N)", mesh)
        x = self.embedding(tokens) * self.config.d_model**0.5
        token_types = kinds_by_id(tokens, self.config.multiway_first_id, token_types)
        x = run_blocks(self.blocks, x, self.config, mesh, cu_seqlens, lengths, token_types, cache)
        return apply_to_rows(self.norm, x, token_types)

    def new_cache(self, batch_size: int = 1) -> tuple[DilatedCache, ...]:
        """Return an empty cache for each layer, in the dtype in which attention is computed now.

        Args:
            batch_size: B.

        Example:
            >>> model = LongNetConfig(d_model=32, num_layers=1).build().eval()
            >>> tokens, cache = torch.randint(257, (1, 100)), model.new_cache()
            >>> with torch.no_grad():
            ...     parts = [model(part, cache=cache) for part in tokens.split(40, dim=1)]
            ...     torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-4)
            True
        """
        weight = self.output.weight
        caches = []
        for block in self.blocks:
            assert isinstance(block, Block)
            attention = block.attention
            sizes = batch_size, attention.num_kv_heads, attention.head_dim
            caches.append(DilatedCache(attention.pattern, *sizes, weight.device, compute_dtype(weight)))
        return tuple(caches)

    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Collection[int] = (),
        seed: int = 0,
        mesh: SequenceMesh | None = None,
    ) -> Tensor | list[Tensor]:
        """Continue sequences token by token, from caches that do not grow with their length; call it in eval mode.

        Args:
            prompt: token ids, (B, N), int64, N >= 1; or sequences of any lengths, (N,) each, which are continued one
                after the other, and of which each begins with the same seed.
            max_new_tokens: the most tokens to add.
            temperature: the divisor of the logits; with 0, the likeliest token is taken.
            top_k: draw from this many likeliest tokens; from all if None.
            top_p: draw from the likeliest tokens whose probabilities sum up to at least this.
            stop: tokens that end a sequence.
            seed: the seed of the draws.
            mesh: ranks that read the prompt together, with its N tokens; every rank then draws the same.

        Returns:
            The sequences with what was added: (B, N + T), T <= max_new_tokens, where one that ended repeats its last
            token; or a list, if the prompt is one.

        Raises:
            ValueError: for an empty prompt, or a value out of range.

        Example:
            >>> model = LongNetConfig(d_model=32, num_layers=1).build().eval()
            >>> model.generate(torch.randint(257, (2, 50)), max_new_tokens=5).shape
            torch.Size([2, 55])
        """
        sampling = Sampling(temperature, top_k, top_p)
        return continue_sequences(self, prompt, max_new_tokens, sampling, stop=stop, seed=seed, mesh=mesh)

    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        mesh: SequenceMesh | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens that `generate` would add to (B, N), one after the other: (B,), int64.

        `progress` is called with the number of tokens of the prompt that were read, after each part. For the other
        arguments see `generate`.
        """
        sampling = Sampling(temperature, top_k, top_p)
        return stream_tokens(self, prompt, max_new_tokens, sampling, seed=seed, mesh=mesh, progress=progress)

    def score(self, text_or_ids: str | bytes | Tensor, mesh: SequenceMesh | None = None) -> Tensor:
        """Compute the log-likelihood of each token given the tokens before it, in nats, without gradients.

        The logits never exist as a whole.

        Args:
            text_or_ids: a text, for the tokenizer of the model; or token ids, (N,), int64.
            mesh: the ranks that share the sequence, which all pass it whole; the call is then collective.

        Returns:
            (N - 1,), float32 (float64 for float64): one number for each token but the first, the same on every rank.

        Raises:
            ValueError: for a text that the tokenizer cannot encode, fewer than 2 tokens, or ids of a wrong shape.

        Example:
            >>> LongNetConfig(d_model=32, num_layers=1).build().eval().score("some text").shape
            torch.Size([8])
        """
        ids = text_or_ids
        if not isinstance(ids, Tensor):
            text = ids.encode() if isinstance(ids, str) else ids
            ids = torch.from_numpy(load_tokenizer(self.tokenizer_file).encode([text])[0].astype("int64"))
        if ids.dim() != 1 or len(ids) < 2 or ids.is_floating_point():
            refuse(f"token ids are {ids.dtype} of shape {tuple(ids.shape)}; they must be integers, (N,), N >= 2", mesh)
        tokens = ids[None].to(self.output.weight.device)
        if mesh is None:
            return log_likelihoods(self, tokens)[0]
        shard = mesh.shard
        scores = log_likelihoods(self, tokens[:, shard.start : min(shard.stop + 1, mesh.seq_len)], mesh)
        padded = torch.nn.functional.pad(scores, (0, shard.num_rows - scores.shape[1]))
        return mesh.join(padded)[0, :-1]

    def save_pretrained(self, folder: Path | str, tokenizer: Path | str | None = None) -> None:
        """Write `config.json`, `model.safetensors` and the tokenizer's file into `folder`, for `from_pretrained`.

        Args:
            folder: the folder to write into; created if it is missing.
            tokenizer: the tokenizer's file; by default `tokenizer_file`. Without one, tokens are bytes.
        """
        save_model(self, self.config, folder, tokenizer or self.tokenizer_file, "causal")

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: torch.device | str | None = None) -> LongNet:
        """Load a model that `save_pretrained` or `longnet-dist export` wrote, in the dtype of the file, in eval mode.

        Args:
            folder: the folder with `config.json` and `model.safetensors`.
            device: device of the parameters; the CPU by default.

        Raises:
            ValueError: if the tensors are not those of the configuration, or the folder is that of a run.
            FileNotFoundError: if a file is missing.
        """
        folder = Path(folder)
        config, tokenizer_file = read_exported_config(folder)
        tensors = read_weights(folder)
        model = cls(config, device, next(iter(tensors.values())).dtype)
        copy_weights(model, tensors, folder)
        model.tokenizer_file = tokenizer_file
        return model.eval()
