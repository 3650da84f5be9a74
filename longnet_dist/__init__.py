"""Sequence-parallel LongNet dilated attention in PyTorch.

Read `pattern`, `reference`, `plan` and `attention`, in that order, and you know the system.
"""

from longnet_dist.attention import dilated_attention
from longnet_dist.config import TrainConfig
from longnet_dist.loss import next_token_labels, token_loss
from longnet_dist.mesh import SequenceMesh
from longnet_dist.model import LongNet, LongNetConfig
from longnet_dist.nn import DilatedAttention
from longnet_dist.pattern import Branch, Pattern
from longnet_dist.reference import dense_reference
from longnet_dist.train import TrainResult, train

__all__ = [
    "Branch",
    "DilatedAttention",
    "LongNet",
    "LongNetConfig",
    "Pattern",
    "SequenceMesh",
    "TrainConfig",
    "TrainResult",
    "dense_reference",
    "dilated_attention",
    "next_token_labels",
    "token_loss",
    "train",
]
