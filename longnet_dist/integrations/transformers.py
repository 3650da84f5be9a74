"""Hugging Face transformers: causal decoders with dilated attention, on one process or over many.

    model = AutoModelForCausalLM.from_config(config)          # or from_pretrained
    apply(model, Pattern((2048, 8192), (1, 4)), mesh=mesh)    # mesh=None for one process
    loss = model(**split_batch(batch, mesh)).loss             # labels are shifted before they are split

What cannot be exact is refused, with the reason: left padding, packed documents, sliding windows, soft caps, attention
dropout, a cache of past keys; and over ranks, layers that see more of a sequence than their rows otherwise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from longnet_dist.attention.ops import dilated_attention
from longnet_dist.distributed.mesh import SequenceMesh, refuse
from longnet_dist.models.loss import IGNORED, next_token_labels, token_loss
from longnet_dist.plan.pattern import Pattern

NAME = "longnet_dist"
_REFUSED = {
    "sliding_window": "a sliding window is another pattern: make it a branch of the Pattern, and None in the config",
    "softcap": "scores are not capped here",
    "s_aux": "attention sinks are not computed here",
}
_PADDED_BEFORE = "attention_mask has padding before tokens, which would be attended: use padding_side='right'"
_KNOWN = {
    "position_ids", "cache_position", "use_cache", "shift_labels", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "is_causal",
}  # fmt: skip
"""What a model may tell its attention that changes nothing in it; anything else may be a mask by another name."""


@dataclass(frozen=True)
class _Stamp:
    """What an attention module attends by."""

    pattern: Pattern
    mesh: SequenceMesh | None


def register() -> None:
    """Put `"longnet_dist"` into transformers' interfaces of attention and masks: without the second, masks vanish."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def apply(model: PreTrainedModel, pattern: Pattern, mesh: SequenceMesh | None = None) -> PreTrainedModel:
    """Have `model` attend by `pattern`, over the ranks of `mesh`, of which each passes its rows of every sequence.

    The loss of `model(..., labels=...)` becomes the mean over the valid labels of all ranks, the same on each; labels
    must be shifted before they are split (`split_batch` does). The *sum* over ranks of a parameter's gradients is
    that of one process.

    Args:
        model: a causal decoder; it is changed, and returned.
        pattern: the branches.
        mesh: of this pattern; None for one process.

    Raises:
        ValueError: where the model is not one that this can be exact for.
    """
    if mesh is not None and mesh.pattern != pattern:
        raise ValueError(f"the mesh is of the pattern {mesh.pattern}, and not {pattern}")
    register()
    stamped = [module for module in model.modules() if _attends(module)]
    if problem := _problem_of_model(model, stamped) or _problem_over_ranks(model, mesh):
        raise ValueError(f"{type(model).__name__} {problem}")
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} does not call transformers' attention interface")
    for module in stamped:
        object.__setattr__(module, "_longnet_dist", _Stamp(pattern, mesh))  # No parameter, and no submodule.
    if before := vars(model).get("_longnet_dist_hook"):
        before.remove()
    hook = model.base_model.register_forward_pre_hook(_Positions(mesh), with_kwargs=True)
    object.__setattr__(model, "_longnet_dist_hook", hook)
    model.loss_function = _Loss(mesh)
    return model


def split_batch(batch: dict[str, Tensor], mesh: SequenceMesh | None) -> dict[str, Tensor]:
    """This rank's part of a batch that every rank has whole, as transformers' data collators make it. Collective.

    Args:
        batch: `input_ids` (B, N), and `labels` and `attention_mask` where there are, *not* shifted.
        mesh: the ranks that hold the sequence; None for one process.

    Returns:
        `input_ids`, `position_ids` (global), `labels` and `shift_labels` (both shifted), `attention_mask`.

    Raises:
        ValueError: where the batch is not of the mesh's length, holds packed documents, or is another on other ranks,
            as a data loader that was prepared for data parallelism makes it; on every rank.
    """
    problem = problem_of_batch(batch, mesh)
    if mesh is not None:
        mesh.agree({"the batch (by a digest)": digest(batch)}, problem, always=True)
    elif problem:
        raise ValueError(problem)
    return rows_of(batch, mesh)


def rows_of(batch: dict[str, Tensor], mesh: SequenceMesh | None) -> dict[str, Tensor]:
    """`split_batch` of a batch that was looked at."""
    given = dict(batch)
    if "labels" in given:
        given["labels"] = given["shift_labels"] = next_token_labels(given["labels"])
    tokens = given["input_ids"]
    given["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
    return given if mesh is None else {name: mesh.split(x) for name, x in given.items()}


def digest(batch: dict[str, Any]) -> int:
    """56 bits of all that a batch holds."""
    made = hashlib.blake2b(digest_size=7)
    for name, x in sorted(batch.items()):
        made.update(f"{name} {tuple(x.shape)} {x.dtype}".encode() if isinstance(x, Tensor) else repr(x).encode())
        if isinstance(x, Tensor):
            made.update(x.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return int.from_bytes(made.digest(), "big")


def problem_of_batch(batch: dict[str, Any], mesh: SequenceMesh | None) -> str | None:
    """What of a whole batch cannot be split, or would be attended otherwise than it asks, in words."""
    if "input_ids" not in batch:
        return f"the batch has {', '.join(batch)}; it must have input_ids"
    packed = [name for name in batch if name == "seq_idx" or name.startswith(("cu_seq_lens", "max_length"))]
    if packed:
        return f"the batch has {', '.join(packed)}: packed documents are not supported"
    tokens = batch["input_ids"]
    for name, x in batch.items():
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != tuple(tokens.shape[:2]) or x.dim() < 2:
            kind = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"{name} is {kind}, and input_ids {tuple(tokens.shape)}; each must be a tensor, (B, N)"
    if mesh is not None and tokens.shape[1] != mesh.seq_len:
        return (
            f"the batch is of {tokens.shape[1]} tokens, and the mesh of seq_len = {mesh.seq_len}: pad "
            f"(padding='max_length', max_length={mesh.seq_len}, padding_side='right') or pack to it, and pass it whole"
        )
    if "attention_mask" in batch and _pads_before_tokens(batch["attention_mask"]):
        return _PADDED_BEFORE
    positions = batch.get("position_ids", torch.arange(tokens.shape[1]))
    if not torch.equal(positions, torch.arange(tokens.shape[1]).to(positions).expand_as(positions)):
        return "position_ids restart, or are not 0 to N - 1: packed documents are not supported; leave them out"
    return None


def _pads_before_tokens(attention_mask: Tensor) -> bool:
    return bool((attention_mask.to(torch.uint8).diff(dim=1) == 1).any())


def _problem_of_model(model: Any, stamped: list[nn.Module]) -> str | None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return "is no PreTrainedModel: apply to the model itself, before it is wrapped"
    if not stamped:
        return "has no attention module that calls transformers' attention interface"
    if not all(getattr(module, "is_causal", True) for module in stamped):
        return "is not causal throughout; only causal decoders are supported"
    if model.base_model is not model and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "is not the causal language model of its kind, ...ForCausalLM, nor its base model: its loss is another"
    return None


def _problem_over_ranks(model: PreTrainedModel, mesh: SequenceMesh | None) -> str | None:
    """What of a model would be computed from a rank's rows alone, and is not."""
    if mesh is None or mesh.size == 1:
        return None
    rows = [mesh.shard.of(rank).num_rows for rank in range(mesh.size)]
    if not min(rows):
        return (
            f"cannot run on a rank that holds no rows, and of {mesh.seq_len} tokens ranks hold {rows}: give the mesh "
            f"chunk={-(-mesh.seq_len // mesh.size)}, or fewer ranks"
        )
    ropes: list[Any] = [getattr(module, "rope_type", None) for module in model.modules()]
    kinds = {str(kind) for rope in ropes for kind in (rope.values() if isinstance(rope, dict) else [rope])}
    if by_length := [kind for kind in kinds if "dynamic" in kind or kind == "longrope"]:
        return f"has rotary positions of the kind {by_length[0]}, which depend on the largest position of a rank's rows"
    layers = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return f"has layers ({', '.join(sorted(layers)) or 'convolutions'}) that would see this rank's rows alone"
    if getattr(model.config, "output_router_logits", False):
        return "adds a loss of its routers, which would be of this rank's rows: set output_router_logits=False"
    return None


def _attends(module: nn.Module) -> bool:
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
    """(B, H, L, D), (B, G, L, D) -> (B, L, H, D), as transformers calls it."""
    stamp = getattr(module, "_longnet_dist", None)
    if stamp is None:
        raise ValueError(
            f"{type(module).__name__} has no pattern: call longnet_dist.integrations.transformers.apply(model, pattern)"
        )
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            given = "" if isinstance(options[name], Tensor) else f" = {options[name]!r}"
            refuse(f"{type(module).__name__} has {name}{given}, and {reason}", stamp.mesh)
    unknown = [name for name, x in options.items() if name not in _KNOWN and x is not None and x is not False]
    if unknown or options.get("is_causal") is False:
        said = ", ".join(unknown) or "is_causal=False"
        refuse(f"{type(module).__name__} is called with {said}, which is not known here", stamp.mesh)
    if options.get("output_router_logits") and stamp.mesh is not None and stamp.mesh.size > 1:
        refuse("the loss of routers would be of this rank's rows: leave out output_router_logits", stamp.mesh)
    if dropout:
        refuse(f"attention_dropout is {dropout}; probabilities cannot be dropped: set it to 0", stamp.mesh)
    if attention_mask is not None:
        refuse("a prepared attention mask cannot be used: the pattern says who sees whom", stamp.mesh)
    if key.shape[2] != query.shape[2]:
        refuse(
            f"{query.shape[2]} new tokens and {key.shape[2]} keys: decoding with a cache of past keys is not supported "
            "yet; call generate(..., use_cache=False), which is exact",
            stamp.mesh,
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = dilated_attention(q, k, v, stamp.pattern, causal=True, scale=scaling, mesh=stamp.mesh)
    return out, None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """None, where plain causal attention is asked for; padding was looked at before the model (`_Positions`)."""
    if mask_function is not causal_mask_function:
        raise ValueError(
            "the model asks for more than a causal mask (packed documents, a sliding window, blocks): pack none "
            "(position_ids must not restart), and use a config without windows. Compiled as a whole it asks for one "
            "whatever the positions are: compile its layers instead"
        )


class _Positions:
    """Before the model: global positions, where none are given; and a refusal of what would be silently wrong."""

    def __init__(self, mesh: SequenceMesh | None) -> None:
        self.mesh = mesh

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = given.get("input_ids", arguments[0] if arguments else None)
        rows = tokens if tokens is not None else given.get("inputs_embeds")
        if rows is None:
            return arguments, given
        mesh = self.mesh
        if mesh is not None and rows.shape[1] != mesh.shard.num_rows:
            refuse(mesh.wrong_rows("the batch", rows.shape[1]) + " (split_batch does)", mesh)
        self._check_padding(given)
        start = 0 if mesh is None else mesh.shard.start
        expected = torch.arange(start, start + rows.shape[1], device=rows.device)[None]
        positions = given.get("position_ids")
        if mesh is None and (positions is None or rows.shape[1] == 1):
            return arguments, given
        if positions is not None and not torch.equal(positions, expected.expand_as(positions)):
            refuse(
                f"position_ids must be global and without restarts, {start} to {start + rows.shape[1] - 1} here: leave "
                "them out, and they are; packed documents are not supported",
                mesh,
            )
        return arguments, given | {"position_ids": expected if positions is None else positions}

    def _check_padding(self, given: dict[str, Any]) -> None:
        """At the end no token sees padding, and none is needed; elsewhere it is refused."""
        mask = given.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            refuse(
                "attention_mask must be (B, N), 1 for tokens and 0 for padding: who sees whom is the pattern's",
                self.mesh,
            )
        whole = mask.to(torch.uint8) if self.mesh is None else self.mesh.join(mask.to(torch.uint8).contiguous())
        if _pads_before_tokens(whole):
            raise ValueError(_PADDED_BEFORE)
        given["attention_mask"] = None


class _Loss:
    """The loss of a causal language model, over the tokens of all ranks."""

    def __init__(self, mesh: SequenceMesh | None) -> None:
        self.mesh = mesh

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
        """The mean over valid labels; or their sum over `num_items_in_batch`, those of *all* ranks and micro-steps."""
        if shift_labels is None:
            if self.mesh is not None and self.mesh.size > 1:
                refuse(
                    "labels must be shifted before they are split, and given as shift_labels: use split_batch",
                    self.mesh,
                )
            assert labels is not None
            shift_labels = next_token_labels(labels, ignore_index)
        return token_loss(logits, shift_labels, self.mesh, ignore_index, num_items_in_batch)
