"""LongNet: a causal decoder language model, whole or sequence-parallel."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longnet_dist.attention.kernels import KERNELS
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.loss import linear_token_loss
from longnet_dist.nn.attention import Block, DilatedAttention, Rotation
from longnet_dist.plan.pattern import HEAD_PHASES, Pattern

_CHOICES = {
    "head_phases": HEAD_PHASES,
    "position": ("rotary", "xpos", "none"),
    "activation_checkpointing": ("none", "selective", "full"),
    "kernel": ("auto", *KERNELS),
}


@dataclass(frozen=True)
class LongNetConfig:
    """The architecture of a `LongNet`."""

    vocab_size: int = 257
    """Token ids; the default is the 256 bytes and an end of document."""
    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward; 4 times d_model by default."""
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Segment lengths of the dilated attention's branches, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 4, 16)
    """Dilation rates of the branches."""
    head_phases: Literal["interleaved", "blocked"] = "interleaved"
    """Which rows each head keeps: the paper's rule, or that of torchscale's weights."""
    position: Literal["rotary", "xpos", "none"] = "rotary"
    """Position encoding, by global position."""
    qk_norm: bool = False
    """RMS-normalise queries and keys."""
    dropout: float = 0.0
    """On the output of attention and feed-forward."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward: none, all but attention's, or all."""
    offload_activations: bool = False
    """Keep what the backward needs of the blocks in the CPU's memory."""
    kernel: str = "auto"
    """Attention kernel; see `longnet-dist doctor`."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be a probability below 1")
        # From JSON they are lists.
        for name in ("segment_lengths", "dilation_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def resolved(self) -> LongNetConfig:
        """The same, with what is left to defaults filled in."""
        return replace(self, num_kv_heads=self.num_kv_heads or self.num_heads, ffn_dim=self.ffn_dim or 4 * self.d_model)

    @property
    def pattern(self) -> Pattern:
        """The branches of the attention."""
        return Pattern(self.segment_lengths, self.dilation_rates, self.head_phases)

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LongNet:
        """The model."""
        return LongNet(self, device, dtype)


class LongNet(nn.Module):
    """A causal decoder with dilated attention, pre-norm and sub-LayerNorm (LongNet, section 4.1; Magneto).

    Args:
        config: the architecture.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not fit each other.

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
        E = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, E, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(self._block(device, dtype) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(E, device=device, dtype=dtype)
        self.output = nn.Linear(E, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.reset_parameters()

    def _block(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Block:
        config = self.config
        attention = DilatedAttention(
            config.d_model,
            config.num_heads,
            config.dilation_rates,
            config.segment_lengths,
            config.dropout,
            causal=True,
            use_xpos=config.position == "xpos",
            use_rotary=config.position == "rotary",
            num_kv_heads=config.num_kv_heads,
            qk_norm=config.qk_norm,
            head_phases=config.head_phases,
            inner_norm=True,
            kernel=config.kernel,
            device=device,
            dtype=dtype,
        )
        return Block(attention, config.ffn_dim or 4 * config.d_model, config.dropout, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Magneto's initialisation; logits begin with a standard deviation of 1."""
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.output.weight, std=self.config.d_model**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters(self.config.num_layers)

    def forward(self, tokens: Tensor, mesh: SequenceMesh | None = None, labels: Tensor | None = None) -> Tensor:
        """int64 (B, N) -> logits (B, N, vocab_size); with a mesh, of this rank's rows: (B, L) -> (B, L, vocab_size).

        With `labels`, the `token_loss` in place of the logits, which are then never there as a whole.

        Raises:
            ValueError: for a wrong shape, or a mesh of another pattern or length.
        """
        x = self.features(tokens, mesh)
        if labels is None:
            return self.output(x)
        if labels.shape != tokens.shape:
            refuse(f"labels is {tuple(labels.shape)} and tokens {tuple(tokens.shape)}; they must be alike", mesh)
        return linear_token_loss(x, self.output.weight, labels, mesh)

    def features(self, tokens: Tensor, mesh: SequenceMesh | None = None) -> Tensor:
        """int64 (B, N) -> what the output projection takes, (B, N, d_model); with a mesh, of this rank's rows.

        Raises:
            ValueError: for a wrong shape, or a mesh of another pattern or length.
        """
        if tokens.dim() != 2:
            refuse(f"tokens is {tuple(tokens.shape)}; it must be (B, N)", mesh)
        x = self.embedding(tokens) * self.config.d_model**0.5
        rotation: Rotation | None = None
        with saved_tensors_hooks(_to_cpu, _from_cpu) if self.config.offload_activations else nullcontext():
            for block in self.blocks:
                assert isinstance(block, Block)
                rotation = rotation or block.attention.rotation(x.shape[1], mesh, x.device, _compute_dtype(x))
                x = self._checkpointed(block)(x, mesh, rotation)
        return self.norm(x)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, for `from_pretrained`.

        Args:
            folder: made where it is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A tied embedding is written once.
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: torch.device | str | None = None) -> LongNet:
        """The model that `save_pretrained` or `longnet-dist export` wrote, in the dtype it was written in.

        Raises:
            ValueError: where the tensors are not those of the configuration.
            FileNotFoundError: where a file is missing.
        """
        folder = Path(folder)
        config = LongNetConfig(**json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors")
        model = cls(config, device, next(iter(tensors.values())).dtype)
        expected = {name: p.shape for name, p in model.named_parameters()}
        given = {name: x.shape for name, x in tensors.items()}
        if given != expected:
            differing = [name for name in expected | given if expected.get(name) != given.get(name)]
            raise ValueError(
                f"{folder}: model.safetensors is not of the model in config.json: {', '.join(differing[:5])}"
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
        return model

    def _checkpointed(self, block: Block) -> Callable[..., Tensor]:
        kind = self.config.activation_checkpointing
        if kind == "none" or not torch.is_grad_enabled():
            return block
        if kind == "full":
            return partial(checkpoint, block, use_reentrant=False)
        attention = [torch.ops.longnet_dist.dilated_attention.default]
        contexts = partial(create_selective_checkpoint_contexts, attention)
        return partial(checkpoint, block, use_reentrant=False, context_fn=contexts)


def _to_cpu(x: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    """Where a saved tensor is kept; parameters stay where they are, as they are there in any case."""
    if isinstance(x, nn.Parameter) or not x.is_cuda:
        return x
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return kept.copy_(x, non_blocking=True), x.device


def _from_cpu(kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].to(kept[1], non_blocking=True)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which attention will be computed: xPos must keep to its range."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
