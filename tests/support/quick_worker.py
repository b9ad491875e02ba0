"""`python -m tests.support.quick_worker worker --lane LANE`: a worker whose heartbeats are INTERVAL_SECONDS apart."""

from workers.celery import heartbeats
from workers.cli.main import main

INTERVAL_SECONDS = 3.0

if __name__ == "__main__":
    heartbeats.INTERVAL_SECONDS = INTERVAL_SECONDS  # before workers.celery.app imports it
    main()
