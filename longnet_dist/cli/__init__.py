"""The command `longnet-dist`: one module for each subcommand."""
