"""The trainer: options, processes, arrangement of ranks, steps, logs, and stopping on signals and hangs."""
