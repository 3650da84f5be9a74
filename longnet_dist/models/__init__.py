"""The decoder language model, its configuration, and its losses."""
