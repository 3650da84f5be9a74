"""Sequence-parallel LongNet dilated attention in PyTorch.

Read `plan/pattern.py`, `attention/reference.py`, `plan/blocks.py` and `attention/ops.py`, in that order, and you
know the system.
"""

from longnet_dist.attention.api import dilated_attention
from longnet_dist.attention.bias import T5Bias
from longnet_dist.attention.reference import dense_reference
from longnet_dist.distributed.mesh import SequenceMesh
from longnet_dist.models.config import LongNetConfig
from longnet_dist.models.decoder import LongNet
from longnet_dist.models.loss import next_token_labels, token_loss
from longnet_dist.nn.attention import DilatedAttention
from longnet_dist.plan.pattern import Branch, Pattern
from longnet_dist.training.config import TrainConfig
from longnet_dist.training.trainer import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "DilatedAttention",
    "LongNet",
    "LongNetConfig",
    "Pattern",
    "SequenceMesh",
    "T5Bias",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "dense_reference",
    "dilated_attention",
    "next_token_labels",
    "token_loss",
    "train",
]
