"""A trained model of a run or an export, on one process or under torchrun, and the data to evaluate it on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from longnet_dist.data.corpus import open_corpus
from longnet_dist.data.shards import TokenStream
from longnet_dist.data.tokenizers import Tokenizer, load_tokenizer
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.decoder import LongNet
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.job import find_tokenizer, load_corpus, read_config
from longnet_dist.training.processes import init_processes
from longnet_dist.training.state import is_export, load_model


@contextlib.contextmanager
def evaluated(folder: Path, seq_len: int | None = None) -> Iterator[tuple[LongNet, TrainConfig, SequenceMesh | None]]:
    """Provide a model in eval mode, the options of its run, and the mesh of all ranks. Collective under torchrun.

    Args:
        folder: the folder of a run, or of an export, whose options are then the defaults.
        seq_len: N; by default that of the run.

    Yields:
        The model on this rank's device, the options with this N, and the mesh; None on one process.

    Raises:
        ValueError: if the model is an encoder, which does not predict the next token.
    """
    config = TrainConfig() if is_export(folder) else read_config(folder)
    config = dataclasses.replace(config, seq_len=seq_len or config.seq_len)
    with init_processes(config) as device:
        model = LongNet.from_pretrained(folder) if is_export(folder) else load_model(folder)
        if not isinstance(model, LongNet):
            raise ValueError(
                f"{folder} trained an encoder (objective mlm), which does not predict the next token; export it, and "
                "load it with LongNetEncoder.from_pretrained"
            )
        mesh = SequenceMesh(dist.group.WORLD, model.config.pattern, config.seq_len) if dist.is_initialized() else None
        yield model.to(device).eval(), config, mesh


def tokenizer_of(folder: Path, model: LongNet) -> Tokenizer:
    """Return the tokenizer of the model of a run or an export.

    Raises:
        ValueError: if its file is missing, or is another tokenizer now.
    """
    return load_tokenizer(model.tokenizer_file if is_export(folder) else find_tokenizer(folder))


def load_name(run: Path) -> str:
    """Return the name of the tokenizer that made a run's tokens."""
    return str(json.loads((run / "config.json").read_text()).get("tokens_by", "bytes"))


def held_out_tokens(
    folder: Path, config: TrainConfig, model: LongNet, data: tuple[str, ...], tokenizer: Path | None
) -> TokenStream:
    """Return the tokens to evaluate on: those of `data`, or those that the run held out. Collective.

    Raises:
        ValueError: on every rank, if the data or its tokenizer is not the run's, or an export comes without data.
    """
    if data:
        name = load_tokenizer(model.tokenizer_file).name if is_export(folder) else load_name(folder)
        path = tokenizer or (model.tokenizer_file if is_export(folder) else config.tokenizer)
        stream = open_corpus(
            data, config.cache, 0.0, tokenizer=path, text_field=config.text_field, seed=config.seed
        ).train
        if stream.index.tokenizer != name:
            raise ValueError(
                f"the run's tokens are by {name}, but the data's are by {stream.index.tokenizer}: give the run's "
                "tokenizer with --tokenizer"
            )
        return stream
    if is_export(folder):
        raise ValueError(f"{folder} is an export, which does not know its data: give --data")
    corpus = load_corpus(config)
    trained_on = json.loads((folder / "config.json").read_text()).get("tokens", corpus.tokens_hash)
    if corpus.tokens_hash != trained_on:
        raise ValueError(
            f"the data of {folder} have changed since it was trained (tokens {trained_on} then, {corpus.tokens_hash} "
            "now), so that other tokens would be held out: restore them, or name what to evaluate on with --data"
        )
    return corpus.validation
