"""Celery's command line with our application: `python -P -m workers.celery worker`, or `beat`, and its options.

`python -m celery` and the script `celery` look for the application in the current directory first.
"""

import sys

from workers.celery.app import APP, celery


def main(arguments: list[str]) -> int:
    """Runs until it is told to end. The application is named because Celery prefers a variable APP to this object."""
    return int(celery.start(["--app", APP, *arguments]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
