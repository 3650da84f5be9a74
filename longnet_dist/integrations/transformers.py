"""Hugging Face transformers: causal decoders with dilated attention, on one process or over many.

    model = AutoModelForCausalLM.from_config(config)          # or from_pretrained
    apply(model, Pattern((2048, 8192), (1, 4)), mesh=mesh)    # mesh=None for one process
    loss = model(**split_batch(batch, mesh)).loss             # labels are shifted before they are split

What cannot be exact is refused, with the reason: left padding, packed documents, sliding windows, soft caps, attention
dropout, and a cache of past keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from longnet_dist.attention import dilated_attention
from longnet_dist.loss import IGNORED, next_token_labels, token_loss
from longnet_dist.mesh import SequenceMesh, refuse
from longnet_dist.pattern import Pattern

NAME = "longnet_dist"
_REFUSED = {
    "sliding_window": "a sliding window is another pattern: make it a branch of the Pattern, and None in the config",
    "softcap": "scores are not capped here",
    "s_aux": "attention sinks are not computed here",
}


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
    if not stamped:
        raise ValueError(f"{type(model).__name__} has no attention module that calls transformers' attention interface")
    if not all(getattr(module, "is_causal", True) for module in stamped):
        raise ValueError(f"{type(model).__name__} is not causal throughout; only causal decoders are supported")
    model.set_attn_implementation(NAME)
    for module in stamped:
        object.__setattr__(module, "_longnet_dist", _Stamp(pattern, mesh))  # No parameter, and no submodule.
    model.base_model.register_forward_pre_hook(_Positions(mesh), with_kwargs=True)
    model.loss_function = _Loss(mesh)
    return model


def split_batch(batch: dict[str, Tensor], mesh: SequenceMesh | None) -> dict[str, Tensor]:
    """This rank's part of a batch that every rank has whole, as transformers' data collators make it.

    Args:
        batch: `input_ids` (B, N), and `labels` and `attention_mask` where there are, *not* shifted.
        mesh: the ranks that hold the sequence; None for one process.

    Returns:
        `input_ids`, `position_ids` (global), `labels` and `shift_labels` (both shifted), `attention_mask`.

    Raises:
        ValueError: where the batch is not of the mesh's length.
    """
    if "input_ids" not in batch:
        raise ValueError(f"the batch has {', '.join(batch)}; it must have input_ids")
    given = dict(batch)
    length = given["input_ids"].shape[1]
    if "labels" in given:
        given["labels"] = given["shift_labels"] = next_token_labels(given["labels"])
    device = given["input_ids"].device
    given["position_ids"] = torch.arange(length, device=device)[None].expand_as(given["input_ids"])
    return given if mesh is None else {name: mesh.split(x) for name, x in given.items()}


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
            refuse(f"{type(module).__name__} has {name} = {options[name]!r}, and {reason}", stamp.mesh)
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
        if (whole.diff(dim=1) == 1).any():
            raise ValueError(
                "attention_mask has padding before tokens, which would be attended: use padding_side='right'"
            )
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
