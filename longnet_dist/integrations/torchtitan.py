"""torchtitan 0.3: decoders with dilated attention, each sequence split across the ranks of the mesh axis "cp".

    def llama3_longnet() -> Trainer.Config:          # in your config registry
        return apply(llama3_8b(), Pattern((2048, 8192, 32768), (1, 4, 16)))

    torchrun ... -m torchtitan.train --module yours --config llama3_longnet --parallelism.context_parallel_degree 8

torchtitan shards the inputs, labels and positions of a sequence evenly. FSDP (`dp_shard`) sums gradients over the ranks
of "cp" together with all others. What cannot be exact raises a ValueError with the reason:

- load balancers, pipelines and CUDA graphs;
- masks, windows and sinks;
- positions that are missing, or not those of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import spmd_types as spmd
import torch
from spmd_types.runtime import get_partition_spec
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common.attention import (
    FlexAttention,
    GQAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_activation_placement
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from longnet_dist import internals
from longnet_dist.attention.api import dilated_attention
from longnet_dist.attention.documents import offsets_of_begins
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.nn.rotary import positions_in_documents
from longnet_dist.plan.pattern import Pattern

if TYPE_CHECKING:
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.trainer import Trainer

_UNSUPPORTED = {
    "score_mod": "scores are not modified here",
    "out_transform": "sinks and gates on the log-sum-exp are not computed here",
}


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of sequences, which torchtitan passes to each layer as its `attention_masks`.

    So a layer that is computed again, for activation checkpointing, gets those of its own batch.
    """

    cu_seqlens: Tensor
    """See `dilated_attention`."""


class DilatedInnerAttention(Module):  # type: ignore[misc]
    """The causal dilated attention that a `GQAttention` of torchtitan calls.

    The `parallelize_fn` that `apply` installs must run before the first forward, also on one process.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):  # type: ignore[misc]
        """The arguments of `dilated_attention`: the branches, and the name of the kernel."""

        pattern: Pattern
        kernel: str = "auto"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pattern, self.kernel = config.pattern, config.kernel
        self.mesh: SequenceMesh | None = None
        self.has_mesh = False

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Declare that heads are sharded over "tp" and rows over "cp", and that q, k and v stay as they are."""
        rows = dense_activation_placement(tp=spmd.S(2))
        # torchtitan's own declaration would gather all k and v over "cp".
        sharding = ShardingConfig(
            in_src_shardings={"q": rows, "k": rows, "v": rows},
            in_dst_shardings={"q": rows, "k": rows, "v": rows},
            out_src_shardings=rows,
            local_map=LocalMapConfig(in_grad_placements=(rows, rows, rows)),
        )
        internals.set_sharding(self, sharding)
        super().parallelize(parallel_dims)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        is_causal: bool = True,
        **options: Any,
    ) -> Tensor:
        """Attend from and to this rank's rows and heads: (B, L, H, D), (B, L, G, D) -> (B, L, H, D).

        Raises:
            ValueError: If the module has no mesh yet, or a mask or option asks for more than causal attention.
        """
        if not self.has_mesh:
            raise ValueError(
                "the model has no mesh: parallelize it, also on one process, by config.model_spec.parallelize_fn of "
                "the config that longnet_dist.integrations.torchtitan.apply returned"
            )
        if attention_masks is not None and not isinstance(attention_masks, PackedDocuments):
            problem = "the attention is called with attention_masks, and the pattern says which keys a query sees"
            refuse(problem, self.mesh)
        for name, reason in _UNSUPPORTED.items():
            if options.get(name) is not None:
                refuse(f"the attention is called with {name}, and {reason}", self.mesh)
        if not is_causal:
            refuse("the attention is called with is_causal=False; only causal decoders are supported", self.mesh)
        with spmd.no_typecheck():
            out: Tensor = dilated_attention(
                q,
                k,
                v,
                self.pattern,
                causal=True,
                scale=scale,
                mesh=self.mesh,
                kernel=self.kernel,
                cu_seqlens=None if attention_masks is None else attention_masks.cu_seqlens,
            )
        if spmd.is_type_checking():
            spmd.assert_type(out, spmd.get_local_type(q), get_partition_spec(q))
        return out


def apply(
    config: Trainer.Config, pattern: Pattern, *, join_documents: bool = False, kernel: str = "auto"
) -> Trainer.Config:
    """Make the model of `config` use dilated attention, across the ranks of its context parallelism.

    This also sets `parallelism.context_parallel_load_balancer` to None, because each rank holds contiguous rows, and
    `training.disable_cuda_graphs` to True, because positions are checked in each step.

    Args:
        config: The config of torchtitan's Trainer, with its `model_spec`; it is changed in place.
        pattern: The branches.
        join_documents: Treat a sequence in which documents are packed, as torchtitan's data loaders of text do, as one
            text with positions from its start. By default documents, which begin where positions are 0, do not see each
            other: each is computed as if it were alone.
        kernel: The name of the kernel, as for `dilated_attention`.

    Returns:
        `config`.

    Raises:
        ValueError: If dilated attention would not be exact for this model.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern is {pattern!r}; it must be a longnet_dist.Pattern")
    spec = config.model_spec
    if spec is None:
        raise ValueError("the config has no model_spec: set it first, for example to model_registry('8B') of llama3")
    for attention in _attentions(spec.model):
        attention.inner_attention = DilatedInnerAttention.Config(pattern=pattern, kernel=kernel)
    parallelize_fn = partial(_parallelize, spec.parallelize_fn, pattern, join_documents)
    config.model_spec = dataclasses.replace(spec, parallelize_fn=parallelize_fn)
    config.parallelism.context_parallel_load_balancer = None
    config.training.disable_cuda_graphs = True
    return config


def _attentions(model: Any) -> list[GQAttention.Config]:
    """Return the config of each layer's attention, which must be plain, causal, and over the whole sequence."""
    if not isinstance(model, Decoder.Config):
        raise ValueError(f"the model is {type(model).__qualname__}; it must be a decoder, such as llama3 or qwen3")
    owner: Any = internals.configured_class(model)
    if owner.get_attention_masks is not Decoder.get_attention_masks:
        raise ValueError(f"{owner.__name__} makes attention masks of its own (windows), which are not computed here")
    attentions: list[Any] = [getattr(layer, "attention", None) for layer in model.layers]
    for attention in attentions:
        if type(attention) is not GQAttention.Config:
            raise ValueError(
                f"{owner.__name__} has a layer of {type(attention).__qualname__}; each must be GQAttention, as in "
                "llama3 and qwen3: no latent or linear attention, sinks or gates"
            )
        inner: Any = attention.inner_attention
        if type(inner) not in (FlexAttention.Config, ScaledDotProductAttention.Config, VarlenAttention.Config):
            raise ValueError(f"the inner attention is {type(inner).__qualname__}; it must be one of torchtitan's own")
        if getattr(inner, "window_size", (-1, 0)) != (-1, 0):
            raise ValueError(
                f"the inner attention has window_size = {inner.window_size}; a sliding window is another pattern: make "
                "it a branch of the Pattern, and window_size (-1, 0)"
            )
    return attentions


def _parallelize(
    parallelize_fn: Callable[..., nn.Module],
    pattern: Pattern,
    join_documents: bool,
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    **others: Any,
) -> nn.Module:
    """Make the mesh, give it to the attention, and call the model's own `parallelize_fn`."""
    mesh = None
    if parallel_dims.cp > 1:
        chunk = -(-training.seq_len // parallel_dims.cp)
        mesh = SequenceMesh(parallel_dims.get_mesh("cp"), pattern, training.seq_len, chunk=chunk)
    problem = _problem(model, pattern, parallel_dims, training, parallelism)
    if mesh is not None:
        mesh.agree({"call": "parallelize", "join_documents": join_documents}, problem)
    elif problem:
        raise ValueError(problem)
    for module in model.modules():
        if isinstance(module, DilatedInnerAttention):
            module.mesh, module.has_mesh = mesh, True
    model.register_forward_pre_hook(_CheckInputs(mesh, join_documents), with_kwargs=True)
    settings = {"parallel_dims": parallel_dims, "training": training, "parallelism": parallelism}
    return parallelize_fn(model, **settings, **others)


def _problem(
    model: Any,
    pattern: Pattern,
    dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
) -> str | None:
    """Return which of the final settings, after the command line, is not supported; None if all are."""
    if dims.pp > 1:
        return f"pipeline_parallel_degree is {dims.pp}; pipelines are not supported: use 1"
    if parallelism.spmd_backend == "partial_dtensor":
        return "spmd_backend is 'partial_dtensor', which shards only torchtitan's own attention; use 'full_dtensor'"
    if not training.disable_cuda_graphs:
        return "CUDA graphs are on, and positions are looked at in each step: set training.disable_cuda_graphs"
    if dims.cp > 1 and (balancer := parallelism.context_parallel_load_balancer) is not None:
        return (
            f"context_parallel_load_balancer is {balancer!r}, which gives a rank rows from several places, and each "
            "must hold contiguous rows: use None (apply sets it; dilated attention's work is even as it is)"
        )
    if training.seq_len % dims.cp:
        return f"seq_len is {training.seq_len}; context_parallel_degree = {dims.cp} must divide it"
    return _heads_problem(model, pattern, dims.tp)


def _heads_problem(model: Any, pattern: Pattern, tp: int) -> str | None:
    """Return why heads would change their phases under "tp", where each rank counts its heads from 0; None if not."""
    attention = model.config.first_attention
    heads = attention.n_kv_heads or attention.n_heads
    local_heads = heads // tp
    for branch in pattern.branches:
        phases = [pattern.phase(head, heads, branch) for head in range(heads)]
        if phases != [pattern.phase(head, local_heads, branch) for head in range(local_heads)] * tp:
            return (
                f"tensor_parallel_degree = {tp} leaves {local_heads} of {heads} key/value heads on a rank, and their "
                f"phases in the branch {branch} {pattern.head_phases} would not be those of the whole: every dilation "
                'rate must divide the heads of a rank, and head_phases be "interleaved"'
            )
    return None


def _local(x: Any) -> Any:
    return x.to_local() if isinstance(x, DTensor) else x


class _CheckInputs:
    """A hook before the model's forward, which finds the documents, and raises for what would be silently wrong."""

    def __init__(self, mesh: SequenceMesh | None, join_documents: bool) -> None:
        self.mesh, self.join_documents = mesh, join_documents

    @spmd.no_typecheck()
    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = dict(zip(("tokens", "positions", "attention_masks"), arguments, strict=False)) | inputs
        tokens, positions = _local(inputs["tokens"]), _local(inputs.get("positions"))
        self._agree(self._problem_of_shapes(tokens, positions))
        if positions is None:
            return (), inputs
        start = 0 if self.mesh is None else self.mesh.shard.start
        rows = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        offsets = self._documents(positions)
        expected = (rows if offsets is None else positions_in_documents(rows, offsets)).expand_as(tokens)
        wrong = "positions are not contiguous: shard with load_balancer_type=None, each rank holds contiguous rows"
        self._agree(None if torch.equal(positions, expected) else wrong)
        if self.join_documents:
            # A copy keeps what torchtitan made of the positions: a DTensor, or an annotated type.
            inputs["positions"] = joined = inputs["positions"].clone()
            _local(joined).copy_(rows.expand_as(tokens))
        elif offsets is not None and inputs.get("attention_masks") is None:
            inputs["attention_masks"] = PackedDocuments(offsets)
        return (), inputs

    def _agree(self, problem: str | None) -> None:
        if self.mesh is not None:
            self.mesh.agree({"call": "the model"}, problem)
        elif problem:
            raise ValueError(problem)

    def _documents(self, positions: Tensor) -> Tensor | None:
        """Return the offsets of the documents of whole sequences, from this rank's positions; see `PackedDocuments`."""
        begins = (positions == 0).to(torch.uint8)
        if self.mesh is not None:
            begins = self.mesh.join(begins)
        begins[:, 0] = 1
        return offsets_of_begins(begins.bool())

    def _problem_of_shapes(self, tokens: Tensor, positions: Tensor | None) -> str | None:
        """Return why these rows cannot have these positions; None if they can."""
        mesh = self.mesh
        if mesh is not None and tokens.shape[1] != mesh.shard.num_rows:
            return mesh.wrong_rows("tokens", tokens.shape[1]).replace("mesh.split(x)", "what cp_shard returns")
        if positions is None:
            return None if mesh is None else "positions are missing, and each rank would take its rows for the first"
        if positions.shape != tokens.shape:
            return f"positions are {tuple(positions.shape)}; they must be of the tokens' shape {tuple(tokens.shape)}"
        return None
