"""`python -P -m workers.cli`: the command line without an installed entry point."""

from workers.cli.main import main

main()
