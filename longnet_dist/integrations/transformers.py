"""Hugging Face transformers: causal decoders with dilated attention, on one process or across ranks.

    model = AutoModelForCausalLM.from_config(config)          # or from_pretrained
    apply(model, Pattern((2048, 8192), (1, 4)), mesh=mesh)    # mesh=None for one process
    loss = model(**split_batch(batch, mesh)).loss             # split_batch shifts the labels, then splits

What cannot be exact raises a ValueError with the reason:

- padding between the tokens of a document;
- sliding windows, soft caps, attention sinks and attention dropout;
- caches but `DilatedPast`, which `generate` uses by itself, and generate on a model with a mesh;
- rotary frequencies that were cast with the model, and values of another head dim;
- across ranks, other layers that look beyond one token, as they would see only this rank's rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from longnet_dist import internals
from longnet_dist.attention.api import dilated_attention
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.integrations._transformers_batches import (
    OFFSETS,
    PACKING,
    CheckInputs,
    problem_of_batch,
    split_batch,
    split_checked_batch,
)
from longnet_dist.integrations._transformers_cache import DilatedPast
from longnet_dist.models.loss import IGNORED, next_token_labels, token_loss
from longnet_dist.plan.pattern import Pattern

__all__ = ["NAME", "DilatedPast", "apply", "problem_of_batch", "register", "split_batch", "split_checked_batch"]

NAME = "longnet_dist"
"""The name under which dilated attention is registered in transformers."""
_UNSUPPORTED = {
    "sliding_window": "a sliding window is another pattern: make it a branch of the Pattern, and None in the config",
    "softcap": "scores are not capped here",
    "s_aux": "attention sinks are not computed here",
}
"""Options of a model's attention that raise, with the reason."""
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "shift_labels", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "is_causal", *PACKING,
}  # fmt: skip
"""Options of a model's attention that do not change its result. Any other may be a mask under another name."""


@dataclass(frozen=True)
class _Stamp:
    """The pattern and mesh of an attention module, and the hook of its model."""

    pattern: Pattern
    mesh: SequenceMesh | None
    inputs: CheckInputs


def register() -> None:
    """Register `"longnet_dist"` in transformers' interfaces of attention and of masks.

    `apply` calls this. Without the second registration, transformers would silently drop masks.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def apply(model: PreTrainedModel, pattern: Pattern | None = None, mesh: SequenceMesh | None = None) -> PreTrainedModel:
    """Make `model` use dilated attention, across the ranks of `mesh`. Each rank passes its rows of every sequence.

    The loss of `model(..., labels=...)` becomes the mean over the valid labels of all ranks, the same on each rank.
    Labels must be shifted before they are split, as `split_batch` does. A parameter's gradients must be *summed* over
    ranks: the sum is the gradient of one process.

    Args:
        model: A causal decoder, which is changed in place.
        pattern: The branches. They are written into the model's config, so that a model which was saved and loaded
            again needs `apply(model)` alone; until then its forward raises.
        mesh: The ranks that hold each sequence, with the same pattern; None for one process.

    Returns:
        `model`.

    Raises:
        ValueError: If dilated attention would not be exact for this model, or the mesh has another pattern.
    """
    pattern = pattern or _pattern_of(model)
    if mesh is not None and mesh.pattern != pattern:
        raise ValueError(f"the mesh is of the pattern {mesh.pattern}, and not {pattern}")
    register()
    attentions = [module for module in model.modules() if _is_attention(module)]
    if problem := _problem_of_model(model, attentions) or _problem_across_ranks(model, mesh):
        raise ValueError(f"{type(model).__name__} {problem}")
    model.set_attn_implementation(NAME)
    if internals.attention_implementation(model.config) != NAME:
        raise ValueError(f"{type(model).__name__} does not call transformers' attention interface")
    inputs = CheckInputs(pattern, mesh)
    for module in attentions:
        # Not through nn.Module's own __setattr__, as the mesh is neither a parameter nor a submodule.
        object.__setattr__(module, "_longnet_dist", _Stamp(pattern, mesh, inputs))
    setattr(model.config, NAME, asdict(pattern))
    # transformers does not save the implementation that is in use, and a reload would attend by another.
    model.config.attn_implementation = NAME
    if mesh is not None and mesh.size > 1:
        object.__setattr__(model, "generate", _refuse_to_generate)
    elif hasattr(type(model), "generate"):
        object.__setattr__(model, "generate", _Generate(model, pattern))
    for previous in vars(model).get("_longnet_dist_hooks", ()):
        previous.remove()
    hooks = (
        model.base_model.register_forward_pre_hook(inputs, with_kwargs=True),
        model.base_model.register_forward_hook(inputs.leave, always_call=True),
    )
    object.__setattr__(model, "_longnet_dist_hooks", hooks)
    model.loss_function = _Loss(mesh, inputs)
    return model


def _pattern_of(model: PreTrainedModel) -> Pattern:
    """Return the pattern in a model's config."""
    saved = getattr(getattr(model, "config", None), NAME, None)
    if saved is None:
        raise ValueError(f"{type(model).__name__} has no pattern in its config: give one, apply(model, pattern)")
    return Pattern(**saved)


class _Generate:
    """The `generate` of a model, with a cache of constant memory; without one for padded prompts."""

    def __init__(self, model: PreTrainedModel, pattern: Pattern) -> None:
        self.model, self.pattern = model, pattern

    def __call__(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
        """See transformers' `GenerationMixin.generate`."""
        model: Any = self.model
        config = options.get("generation_config") or (args[0] if args else None) or model.generation_config
        tokens = options.get("input_ids") if inputs is None else inputs
        mask, padding = options.get("attention_mask"), options.get("pad_token_id", config.pad_token_id)
        if mask is None and tokens is not None and isinstance(padding, int):
            mask = tokens != padding
        uses_cache = options.get("use_cache", config.use_cache) is not False
        if mask is not None and not bool((mask != 0).all()):
            options["use_cache"] = False
        elif uses_cache and options.get("cache", options.get("past_key_values")) is None:
            options["cache"] = DilatedPast(self.pattern)
        return type(model).generate(model, inputs, *args, **options)


def _refuse_to_generate(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "generate needs whole sequences, and this model has a mesh, whose ranks hold parts of them: call apply(model) "
        "without a mesh first, and generate on one rank, or on each for itself"
    )


def _problem_of_model(model: Any, attentions: list[nn.Module]) -> str | None:
    """Return why a model is not supported, as the end of a sentence that begins with its name; None if it is."""
    class_name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return "is no PreTrainedModel: apply to the model itself, before it is wrapped"
    if not attentions:
        return "has no attention module that calls transformers' attention interface"
    if not all(getattr(module, "is_causal", True) for module in attentions):
        return "is not causal throughout; only causal decoders are supported"
    if "v_head_dim" in model.config.to_dict():
        return "has values of another head dim than its queries (multi-head latent attention), which is not supported"
    cast = {str(x.dtype) for name, x in model.named_buffers() if "inv_freq" in name and x.dtype.itemsize < 4}
    if cast:
        return (
            f"has rotary frequencies in {cast.pop()}, whose angles are wrong by radians at far positions: do not cast "
            "a model as a whole (model.to(torch.bfloat16)), but make it by from_pretrained(..., dtype=torch.bfloat16) "
            "or from_config(config, dtype=torch.bfloat16), which keep frequencies in float32"
        )
    if model.base_model is not model and not class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "is not the causal language model of its kind, ...ForCausalLM, nor its base model: its loss is another"
    return None


def _problem_across_ranks(model: PreTrainedModel, mesh: SequenceMesh | None) -> str | None:
    """Return why a part of the model would wrongly see only this rank's rows; None if no part would."""
    if mesh is None or mesh.size == 1:
        return None
    rows = [mesh.shard.of(rank).num_rows for rank in range(mesh.size)]
    if not min(rows):
        return (
            f"cannot run on a rank that holds no rows, and of {mesh.seq_len} tokens ranks hold {rows}: give the mesh "
            f"chunk={-(-mesh.seq_len // mesh.size)}, or fewer ranks"
        )
    ropes: list[Any] = [getattr(module, "rope_type", None) for module in model.modules()]
    names = {str(name) for rope in ropes for name in (rope.values() if isinstance(rope, dict) else [rope])}
    if by_length := [name for name in names if "dynamic" in name or name == "longrope"]:
        return f"has rotary positions of the kind {by_length[0]}, which depend on the largest position of a rank's rows"
    layers = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return f"has layers ({', '.join(sorted(layers)) or 'convolutions'}) that would see this rank's rows alone"
    if getattr(model.config, "output_router_logits", False):
        return "adds a loss of its routers, which would be of this rank's rows: set output_router_logits=False"
    return None


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(module, "config")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention in transformers' layouts: (B, H, L, D), (B, G, L, D) -> (B, L, H, D)."""
    stamp = getattr(module, "_longnet_dist", None)
    if stamp is None:
        raise ValueError(
            f"{type(module).__name__} of a model that was loaded: call "
            "longnet_dist.integrations.transformers.apply(model), which reads the pattern from its config"
            if hasattr(getattr(module, "config", None), NAME)
            else f"{type(module).__name__} has no pattern: call "
            "longnet_dist.integrations.transformers.apply(model, pattern)"
        )
    problem = _problem_of_options(module, options, across_ranks=stamp.mesh is not None and stamp.mesh.size > 1)
    if problem is None and dropout:
        problem = f"attention_dropout is {dropout}; probabilities cannot be dropped: set it to 0"
    if problem is None and attention_mask is not None:
        problem = "a prepared attention mask cannot be used: the pattern says which keys a query sees"
    if problem is None and key.shape[2] != query.shape[2]:
        problem = (
            f"{query.shape[2]} new tokens and {key.shape[2]} keys: of caches only DilatedPast is supported; call "
            "generate, which uses it, or generate(..., use_cache=False)"
        )
    offsets = options.get(OFFSETS)
    if problem is None and stamp.inputs.has_documents not in (None, offsets is not None):
        problem = f"{type(module).__name__} is not told of documents or padding, which would see each other"
    if problem:
        refuse(problem, stamp.mesh)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    past = None if stamp.inputs.past is None else stamp.inputs.past.of_layer(module.layer_idx)
    options_of_call = {"causal": True, "scale": scaling, "mesh": stamp.mesh, "cache": past}
    return dilated_attention(q, k, v, stamp.pattern, cu_seqlens=offsets, **options_of_call), None


def _problem_of_options(module: nn.Module, options: dict[str, Any], across_ranks: bool) -> str | None:
    """Return why an option that a model passes to its attention is not supported; None if all are."""
    class_name = type(module).__name__
    for name, reason in _UNSUPPORTED.items():
        if options.get(name) is not None:
            setting = name if isinstance(options[name], Tensor) else f"{name} = {options[name]!r}"
            return f"{class_name} has {setting}, and {reason}"
    unknown = [name for name, x in options.items() if name not in _HARMLESS and x is not None and x is not False]
    if unknown or options.get("is_causal") is False:
        return f"{class_name} is called with {', '.join(unknown) or 'is_causal=False'}, which is not known here"
    if options.get("output_router_logits") and across_ranks:
        return "the loss of routers would be of this rank's rows: leave out output_router_logits"
    return None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """Return None for plain causal attention, and raise for any other mask. `CheckInputs` has checked the padding."""
    if mask_function is not causal_mask_function:
        raise ValueError(
            "the model asks for more than a causal mask (a sliding window, blocks): use a config without windows. "
            "Compiled as a whole it asks for one whatever the positions are: compile its layers instead"
        )


class _Loss:
    """The loss of a causal language model, over the tokens of all ranks."""

    def __init__(self, mesh: SequenceMesh | None, inputs: CheckInputs) -> None:
        self.mesh, self.inputs = mesh, inputs

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the mean over valid labels.

        With `num_items_in_batch`, the valid labels of *all* ranks and micro-batches of a step, it is the sum over the
        labels divided by that number.
        """
        if shift_labels is None:
            if self.mesh is not None and self.mesh.size > 1:
                refuse(
                    "labels must be shifted before they are split, and passed as shift_labels: use split_batch",
                    self.mesh,
                )
            assert labels is not None
            shift_labels = next_token_labels(labels, ignore_index)
            if (has_target := self.inputs.has_target) is not None:
                shift_labels = shift_labels.masked_fill(~has_target, ignore_index)
        return token_loss(logits, shift_labels, self.mesh, ignore_index, num_items_in_batch)


register()
