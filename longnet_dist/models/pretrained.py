"""Folders with a model's configuration, weights and tokenizer, which `save_pretrained` writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longnet_dist.data.tokenizers import load_tokenizer
from longnet_dist.models.config import LongNetConfig
from longnet_dist.paths import write_whole

WEIGHTS = "model.safetensors"


def save_model(
    model: nn.Module, config: LongNetConfig, folder: Path | str, tokenizer: Path | str | None, objective: str
) -> None:
    """Write a model's `config.json`, `model.safetensors` and tokenizer into a folder.

    Args:
        model: the model.
        config: its architecture.
        folder: the folder to write into; created if it is missing.
        tokenizer: the tokenizer's file; None for bytes.
        objective: what the model was trained for; see `TrainConfig.objective`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(tokenizer)
    about = {"name": loaded.name, "file": None, "end_of_document": loaded.end_of_document}
    if tokenizer is not None:
        about["file"] = Path(tokenizer).name
        if Path(tokenizer).resolve() != (folder / Path(tokenizer).name).resolve():
            shutil.copyfile(tokenizer, folder / Path(tokenizer).name)
    # Unlike state_dict(), named_parameters() lists a tied weight once.
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # It was written for its owner alone.
    facts = {"tokenizer": about} | ({} if objective == "causal" else {"objective": objective})
    write_whole(folder / "config.json", json.dumps(asdict(config.resolved) | facts, indent=2))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors that `save_model` wrote."""
    return load_file(folder / WEIGHTS)


def copy_weights(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Set a model's parameters to the tensors of an export.

    Args:
        model: the model, of the configuration in the folder.
        tensors: the result of `read_weights`.
        folder: the folder, for the error.

    Raises:
        ValueError: if the tensors are not those of the configuration.
    """
    expected = {name: p.shape for name, p in model.named_parameters()}
    stored = {name: x.shape for name, x in tensors.items()}
    if stored != expected:
        differing = [name for name in expected | stored if expected.get(name) != stored.get(name)]
        raise ValueError(
            f"{folder}: model.safetensors is not of the model in config.json: {', '.join(differing[:5])} differ; "
            "use the two files of one export"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
