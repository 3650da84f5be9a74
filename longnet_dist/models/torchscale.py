"""Weights of torchscale's LongNet, Microsoft's published code, as models of this package."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.encoder import LongNetEncoder

_LAYER = {
    **{f"attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "attention.inner_norm": "self_attn.inner_attn_ln",
    "attention_norm": "self_attn_layer_norm",
    "ffn.fc1": "ffn.fc1",
    "ffn.inner_norm": "ffn.ffn_layernorm",
    "ffn.fc2": "ffn.fc2",
    "ffn_norm": "final_layer_norm",
}
"""The names of a block's parts in torchscale."""
_XPOS = "self_attn.xpos.scale"
_KINDS = {"A", "B"}


def encoder_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    padding: str = "torchscale",
    scale_embedding: bool = False,
) -> LongNetEncoder:
    """Build the encoder of torchscale's `LongNetEncoder` weights, in eval mode; with two kinds of tokens if multiway.

    Without token embeddings in `state_dict`, the encoder takes vectors of width d_model as they are: `input_dim` is
    d_model, and the projection is the identity.

    Args:
        state_dict: the weights by torchscale's names, for example read by `torch.load(..., weights_only=True)`.
        num_heads: H; the weights do not say it.
        segment_lengths, dilation_rates: w and r of each branch, which the weights do not say, either.
        padding: "torchscale" for the results that the weights were trained for, or "none" for exact attention.
        scale_embedding: whether torchscale multiplied embeddings by sqrt(d_model) (its `no_scale_embedding=False`).

    Returns:
        The encoder, in the dtype of the weights. If it has no `layer_norm`, it has no final norm.

    Raises:
        ValueError: if weights are missing, unexpected, or of a wrong shape; the message lists all of them.
    """
    weights = dict(state_dict)
    config = read_config(weights, num_heads, segment_lengths, dilation_rates, padding)
    embedding = weights.get("embed_tokens.weight")
    encoder = LongNetEncoder(
        config if embedding is None else replace(config, vocab_size=len(embedding)),
        input_dim=config.d_model if embedding is None else None,
        final_norm=any(name.startswith("layer_norm.") for name in weights),
        dtype=_dtype(weights),
    )
    given = rename_weights(weights, config, scale_embedding)
    if embedding is None:
        E, dtype = config.d_model, _dtype(weights)
        given |= {"embedding.weight": torch.eye(E, dtype=dtype), "embedding.bias": torch.zeros(E, dtype=dtype)}
    load_all(encoder, given, "torchscale's encoder")
    return encoder.eval()


def decoder_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    padding: str = "torchscale",
    scale_embedding: bool = False,
) -> LongNet:
    """Build the language model of torchscale's `LongNetDecoder` weights, in eval mode.

    Positions are those of xPos if the weights have its scales, and otherwise none. Of multiway weights torchscale's
    decoders have norms and feed-forward networks only once, which become those of both kinds of tokens.

    Args:
        state_dict, num_heads, segment_lengths, dilation_rates, padding, scale_embedding: see
            `encoder_from_state_dict`.

    Raises:
        ValueError: if weights are missing, unexpected, or of a wrong shape; the message lists all of them.
    """
    weights = dict(state_dict)
    config = read_config(weights, num_heads, segment_lengths, dilation_rates, padding)
    vocab_size = len(weights["embed_tokens.weight"]) if "embed_tokens.weight" in weights else config.vocab_size
    model = LongNet(replace(config, vocab_size=vocab_size, tie_embeddings=False), dtype=_dtype(weights))
    given = rename_weights(weights, config, scale_embedding)
    for first in [name for name, _ in model.named_parameters() if ".A." in name]:
        second, once = first.replace(".A.", ".B."), first.replace(".A.", ".")
        if once in given and given.keys().isdisjoint({first, second}):
            given[first] = given[second] = given.pop(once)
    load_all(model, given, "torchscale's decoder")
    return model.eval()


def read_weights_file(path: Path, entries: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """Read weights by name from a file that torch.save wrote, which cannot run code.

    Args:
        path: the file.
        entries: the names under which the weights may lie in the file; otherwise the file is the weights.

    Raises:
        ValueError: if the file is no file of weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Options of a training, which hold no code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of weights alone: {str(error).partition(chr(10))[0]}") from None
    if isinstance(content, dict):
        content = next((content[entry] for entry in entries if entry in content), content)
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{path} has no weights by name, nor has its entry {' or '.join(map(repr, entries))}")
    return content


def load_all(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Copy every weight into the parameter of its name; none may be left over, missing, or of another shape.

    Args:
        model: the model, whose parameters are overwritten.
        weights: the weights by the model's names.
        what: what the weights are of, for the error.

    Raises:
        ValueError: naming all weights that do not fit.
    """
    parameters = dict(model.named_parameters())
    problems = [f"{name} is missing" for name in parameters.keys() - weights.keys()]
    problems += [f"{name} is unexpected" for name in weights.keys() - parameters.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(parameters[name].shape)}"
        for name in parameters.keys() & weights.keys()
        if weights[name].shape != parameters[name].shape
    ]
    if problems:
        raise ValueError(f"the weights are not those of {what}: {'; '.join(sorted(problems))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def read_config(
    weights: Mapping[str, Tensor], num_heads: int, segment_lengths: Sequence[int], rates: Sequence[int], padding: Any
) -> LongNetConfig:
    """Read the architecture of a model from its weights.

    Args:
        weights: the weights by torchscale's names.
        num_heads, segment_lengths, rates, padding: see `encoder_from_state_dict`.

    Raises:
        ValueError: if there are no layers, or one is missing.
    """
    layers = {
        int(name.split(".")[1]) for name in weights if name.startswith("layers.") and name.split(".")[1].isdigit()
    }
    fc1 = _first_matrix(weights)
    if fc1 is None or fc1.dim() != 2 or layers != set(range(len(layers))):
        raise ValueError(
            "the weights have no layers.0.ffn.fc1.weight (hidden width, d_model), or lack a layer; names must begin "
            f"with layers.0, layers.1, ...; there are {', '.join(sorted(weights)[:5]) or 'none'}"
        )
    return LongNetConfig(
        d_model=fc1.shape[1],
        ffn_dim=fc1.shape[0],
        num_layers=len(layers),
        num_heads=num_heads,
        segment_lengths=tuple(segment_lengths),
        dilation_rates=tuple(rates),
        head_phases="blocked",
        padding=padding,
        position="xpos" if any(name.endswith(_XPOS) for name in weights) else "none",
        sub_layernorm=any("inner_attn_ln" in name or "ffn_layernorm" in name for name in weights),
        multiway=any(_KINDS & set(name.split(".")) for name in weights),
    )


def _first_matrix(weights: Mapping[str, Tensor]) -> Tensor | None:
    names = (f"layers.0.ffn.{kind}fc1.weight" for kind in ("", "A."))
    return next((weights[name] for name in names if name in weights), None)


def _dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    matrix = _first_matrix(weights)
    assert matrix is not None
    return matrix.dtype


def rename_weights(weights: Mapping[str, Tensor], config: LongNetConfig, scale_embedding: bool) -> dict[str, Tensor]:
    """Rename torchscale's weights; names that are not its own stay, so that `load_all` lists them.

    Args:
        weights: the weights by torchscale's names.
        config: the result of `read_config`.
        scale_embedding: see `encoder_from_state_dict`.
    """
    names = {"embed_tokens.weight": "embedding.weight", "output_projection.weight": "output.weight"}
    names |= {f"layer_norm.{end}": f"norm.{end}" for end in ("weight", "bias")}
    for i in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            names |= {f"layers.{i}.{theirs}.{end}": f"blocks.{i}.{ours}.{end}" for end in ("weight", "bias")}
    fixed = [f"layers.{i}.{_XPOS}" for i in range(config.num_layers)]  # Not learned: `Rotation` computes them.
    result = {_renamed(name, names): x for name, x in weights.items() if name not in fixed}
    for name, x in result.items():
        if name == "embedding.weight" and not scale_embedding:
            result[name] = x / config.d_model**0.5
        rotated = config.position == "xpos" and not {"q_proj", "k_proj"}.isdisjoint(name.split("."))
        if rotated and x.shape[0] == config.d_model:
            # torchscale rotates dimensions 2 i and 2 i + 1 of a head together; `Rotation` i and i + D / 2.
            result[name] = x.unflatten(0, (config.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return result


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Rename a weight; the kind of a multiway one stays behind the module that has two."""
    parts = name.split(".")
    kind = next((part for part in parts if part in _KINDS), None)
    if kind is None:
        return names.get(name, name)
    parts.remove(kind)
    ours = names.get(".".join(parts))
    if ours is None:
        return name
    renamed = ours.split(".")
    renamed.insert(renamed.index("ffn") + 1 if "ffn" in renamed else len(renamed) - 1, kind)
    return ".".join(renamed)
