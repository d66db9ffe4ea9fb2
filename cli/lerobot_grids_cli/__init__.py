"""The command `lerobot-grids`: one module per subcommand, imported when it is used."""
