"""The LongNet layer, rotary positions, and the transformer block."""
