"""`python -P -m workers.cli`: the command line where no entry point is installed."""

from workers.cli.main import main

main()
