"""Sequence-parallel LongNet dilated attention in PyTorch.

Read `plan/pattern.py`, `attention/reference.py`, `plan/blocks.py` and `attention/ops.py`, in that order, and you
know the system.

The public names are imported when they are first used, because torch takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longnet_dist.attention.api import dilated_attention
    from longnet_dist.attention.bias import ALiBiBias, T5Bias
    from longnet_dist.attention.cache import DilatedCache
    from longnet_dist.attention.reference import dense_reference
    from longnet_dist.data.tokenizers import load_tokenizer
    from longnet_dist.distributed.mesh import SequenceMesh
    from longnet_dist.models.config import LongNetConfig
    from longnet_dist.models.decoder import LongNet
    from longnet_dist.models.encoder import LongNetEncoder
    from longnet_dist.models.loss import next_token_labels, token_loss
    from longnet_dist.nn.attention import DilatedAttention
    from longnet_dist.plan.pattern import Branch, Pattern
    from longnet_dist.training.config import TrainConfig
    from longnet_dist.training.trainer import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "ALiBiBias",
    "Branch",
    "DilatedAttention",
    "DilatedCache",
    "LongNet",
    "LongNetConfig",
    "LongNetEncoder",
    "Pattern",
    "SequenceMesh",
    "T5Bias",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "dense_reference",
    "dilated_attention",
    "load_tokenizer",
    "next_token_labels",
    "token_loss",
    "train",
]

_MODULES = {
    "ALiBiBias": "attention.bias",
    "Branch": "plan.pattern",
    "DilatedAttention": "nn.attention",
    "DilatedCache": "attention.cache",
    "LongNet": "models.decoder",
    "LongNetConfig": "models.config",
    "LongNetEncoder": "models.encoder",
    "Pattern": "plan.pattern",
    "SequenceMesh": "distributed.mesh",
    "T5Bias": "attention.bias",
    "TrainConfig": "training.config",
    "TrainResult": "training.trainer",
    "dense_reference": "attention.reference",
    "dilated_attention": "attention.api",
    "load_tokenizer": "data.tokenizers",
    "next_token_labels": "models.loss",
    "token_loss": "models.loss",
    "train": "training.trainer",
}
"""The module that defines each public name."""

if not TYPE_CHECKING:  # A type checker would take every misspelt name for one that this function knows.

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
