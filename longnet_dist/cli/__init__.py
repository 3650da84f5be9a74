"""The command `longnet-dist`: one module per subcommand. None imports torch until it needs it, to keep help quick."""
