"""`python -P -m workers.console`: the console's server."""

from workers.console.server import main

if __name__ == "__main__":
    main()
