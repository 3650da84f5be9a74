"""Process groups: collectives, the sequence mesh, and heads as DTensors."""
