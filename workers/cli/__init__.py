"""The command line: each command is a few lines around a plain function elsewhere."""
