from longnet_dist.attention import dilated_attention
from longnet_dist.mesh import SequenceMesh
from longnet_dist.pattern import Branch, Pattern
from longnet_dist.reference import dense_reference
