"""The command `longnet-dist`: one module per subcommand. Imports of torch are delayed, so that `--help` is quick."""
