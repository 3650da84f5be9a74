"""Checkpoints that survive crashes, on a disk or in an object store, read without trust."""
