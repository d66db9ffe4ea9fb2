"""The command `lerobot-grids`: one module per subcommand, imported on use."""
