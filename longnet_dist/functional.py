"""Dilated attention with the names and the layout of `torch.nn.functional.scaled_dot_product_attention`."""

from longnet_dist.attention.sdpa import scaled_dot_product_dilated_attention

__all__ = ["scaled_dot_product_dilated_attention"]
