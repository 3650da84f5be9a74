"""The trainer: options, processes, arrangement of ranks, steps, their cost, state, logs, and stopping."""
