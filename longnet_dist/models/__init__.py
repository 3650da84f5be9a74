"""The decoder language model and its losses."""
