"""The LongNet attention layer, rotary positions, and the transformer block."""
