"""The configuration of a language model. This module does not import torch, so that `--help` is quick."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longnet_dist.plan.pattern import HEAD_PHASES, MAX_SIZE, Pattern

if TYPE_CHECKING:
    import torch

    from longnet_dist.models.decoder import LongNet

BYTES_VOCABULARY = 257
DEFAULT_LENGTH = 16384
"""The length of the sequences for which branches are chosen if nothing else says it, in tokens."""
_CHOICES = {
    "head_phases": HEAD_PHASES,
    "padding": ("none", "torchscale"),
    "position": ("rotary", "xpos", "alibi", "t5", "none"),
    "qk_norm": ("none", "rms", "layer"),
    "activation_checkpointing": ("none", "selective", "full"),
}


@dataclass(frozen=True)
class LongNetConfig:
    """The architecture of a `LongNet`.

    Raises:
        ValueError: if a value is out of range, or is not one of the choices.

    Example:
        >>> LongNetConfig(d_model=64, num_heads=4).resolved.ffn_dim
        256
    """

    vocab_size: int = BYTES_VOCABULARY
    """Number of token ids; the default is the 256 bytes and an end-of-document token, or in a run the number that its
    tokenizer has, if that is larger."""
    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads; num_heads by default."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward network; 4 * d_model by default."""
    segment_lengths: tuple[int, ...] | None = None
    """Segment length of each branch of the dilated attention, in tokens. By default 1024, 4096, ... up to the length of
    the sequence that is trained (16384 without a training)."""
    dilation_rates: tuple[int, ...] | None = None
    """Dilation rate of each branch; by default 1, 4, ..., in proportion to the segment lengths."""
    head_phases: Literal["interleaved", "blocked"] = "interleaved"
    """Which rows each head keeps: the paper's rule (interleaved), or that of torchscale's weights (blocked)."""
    padding: Literal["none", "torchscale"] = "none"
    """What fills a segment's last rows: nothing (none), or zero rows that are attended, for torchscale's weights."""
    position: Literal["rotary", "xpos", "alibi", "t5", "none"] = "rotary"
    """Position encoding, by global position (rotary, xpos), or position bias, by token distance (alibi, t5)."""
    rope_theta: float = 10000.0
    """Base of the angles of rotary and xpos positions; a larger one has longer wavelengths."""
    yarn_factor: float = 1.0
    """YaRN's stretch of rotary positions, for sequences this many times as long as those of the weights' training."""
    original_max_position_embeddings: int = 0
    """Length of the sequences that the weights were trained with before, in tokens; only with yarn_factor."""
    qk_norm: Literal["none", "rms", "layer"] = "none"
    """Normalisation of the queries and keys of each head: none, by their RMS, or LayerNorm (layer)."""
    sub_layernorm: bool = True
    """Whether attention and feed-forward networks have Magneto's sub-LayerNorm before their last projection."""
    multiway: bool = False
    """Whether tokens of a second kind, such as patches of images, have projections, norms and feed-forward networks of
    their own."""
    multiway_first_id: int | None = None
    """The first token id of the second kind, if ids tell kinds: those from it on, for example the codes of images
    behind a text's vocabulary. A training needs it; a call of the model can give token_types."""
    dropout: float = 0.0
    """Dropout probability of the outputs of attention and feed-forward networks."""
    tie_embeddings: bool = True
    """Whether the output projection shares the embedding's weight."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Which activations the backward recomputes: none, all except attention's (selective), or all (full)."""
    offload_activations: bool = False
    """Whether to keep in CPU memory the tensors that the blocks save for the backward."""
    kernel: str = "auto"
    """Attention kernel; `longnet-dist doctor` lists them."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
            size = getattr(self, name)
            if size is None and name in ("num_kv_heads", "ffn_dim"):
                continue
            if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
                raise ValueError(f"{name} is {size!r}; it must be an integer of at least 1 and at most 2^48")
        original = self.original_max_position_embeddings
        if not isinstance(original, int) or not 0 <= original <= MAX_SIZE:
            raise ValueError(f"original_max_position_embeddings is {original!r}; it must be 0 to 2^48")
        if isinstance(self.qk_norm, bool):  # As earlier versions wrote it.
            object.__setattr__(self, "qk_norm", "rms" if self.qk_norm else "none")
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if self.kernel != "auto":
            # Imported here because it imports torch.
            from longnet_dist.attention.kernels import KERNELS

            _check_choice("kernel", self.kernel, ("auto", *KERNELS))
        _check_rope(self)
        if (first := self.multiway_first_id) is not None and not (self.multiway and 1 <= first <= MAX_SIZE):
            raise ValueError(f"multiway_first_id is {first}; it needs multiway, and must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be a probability below 1")
        # JSON has lists in place of tuples.
        for name, other in (("segment_lengths", "dilation_rates"), ("dilation_rates", "segment_lengths")):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
                if getattr(self, other) is None:
                    raise ValueError(f"{name} is {getattr(self, name)}, without {other}: give both, or neither")

    @property
    def resolved(self) -> LongNetConfig:
        """The same configuration with the values that depend on others filled in."""
        num_kv_heads, ffn_dim = self.num_kv_heads or self.num_heads, self.ffn_dim or 4 * self.d_model
        return replace(self.for_length(DEFAULT_LENGTH), num_kv_heads=num_kv_heads, ffn_dim=ffn_dim)

    def for_length(self, seq_len: int) -> LongNetConfig:
        """Return the same configuration with branches for sequences of `seq_len` tokens, unless it has branches.

        Example:
            >>> LongNetConfig().for_length(65536).segment_lengths
            (1024, 4096, 16384, 65536)
        """
        if self.segment_lengths is not None:
            return self
        pattern = Pattern.geometric(seq_len, base=1024, growth=4)
        return replace(self, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)

    @property
    def pattern(self) -> Pattern:
        """The branches of the dilated attention."""
        config = self.for_length(DEFAULT_LENGTH)
        assert config.segment_lengths is not None
        assert config.dilation_rates is not None
        return Pattern(config.segment_lengths, config.dilation_rates, self.head_phases)

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LongNet:
        """Build the model, with newly initialised parameters.

        Args:
            device, dtype: device and dtype of the parameters; torch's defaults if None.

        Returns:
            The model.

        Raises:
            ValueError: if the sizes do not fit each other.
        """
        # Imported here because it imports this module, and torch.
        from longnet_dist.models.decoder import LongNet

        return LongNet(self, device, dtype)


def read_exported_config(folder: Path, objective: str = "causal") -> tuple[LongNetConfig, Path | None]:
    """Read the config.json of a model that `longnet-dist export` wrote.

    Args:
        folder: the folder that holds it.
        objective: what the model must have been trained for; see `TrainConfig.objective`.

    Returns:
        The architecture, and the file of the tokenizer; None for bytes.

    Raises:
        ValueError: if it is the config of a run, or of a model of another objective or version.
        FileNotFoundError: if it is missing.
    """
    path = folder / "config.json"
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {type(content).__name__}; it must be an object")
    if "model" in content and "seq_len" in content:
        raise ValueError(f"{folder} is a run; export its model first: longnet-dist export {folder} FOLDER")
    file = (content.pop("tokenizer", None) or {}).get("file")
    if (found := content.pop("objective", "causal")) != objective:
        loader = {"causal": "a decoder, for LongNet", "mlm": "an encoder, for LongNetEncoder"}
        raise ValueError(f"{folder} holds {loader.get(found, found)}.from_pretrained")
    if unknown := sorted(content.keys() - {f.name for f in fields(LongNetConfig)}):
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}; another version may know them")
    return LongNetConfig(**content), None if file is None else folder / Path(file).name


def _check_rope(config: LongNetConfig) -> None:
    if not 1 < config.rope_theta < math.inf:
        raise ValueError(f"rope_theta is {config.rope_theta}; it must be above 1, for example 10000 or 500000")
    if not 1 <= config.yarn_factor < math.inf:
        raise ValueError(f"yarn_factor is {config.yarn_factor}; it must be at least 1, which changes nothing")
    if config.yarn_factor > 1 and config.position != "rotary":
        raise ValueError(f"yarn_factor needs position='rotary', and the position is {config.position!r}")
    if config.yarn_factor > 1 and not 1 <= config.original_max_position_embeddings <= MAX_SIZE:
        raise ValueError(
            f"yarn_factor is {config.yarn_factor} and original_max_position_embeddings is "
            f"{config.original_max_position_embeddings}: give the seq_len that the weights were trained with"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
