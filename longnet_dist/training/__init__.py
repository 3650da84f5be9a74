"""The trainer: options, processes, parallelism, logs, and stopping well."""
